"""TensorRT engines, built by Torch-TensorRT from the programs of `export.engines.programs` instead of ONNX.

The engines are run by TensorRT alone, without Torch-TensorRT.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from export.engines import tensorrt
from export.engines.tensorrt import BuildError, EngineInfo
from handlers.manifest import Batch, Manifest, StageSpec
from handlers.runtimes import RuntimeMissing, engine_store, pt2
from handlers.runtimes.tensorrt import library
from handlers.runtimes.torch import SUFFIX, version

NAME = "torch-tensorrt"


def build_bundle(bundle: Path, progress: Callable[[str], None] = lambda _: None) -> Manifest:
    """Compile the programs of every stage of ``bundle`` for this machine's GPU, and update its manifest.

    Raises:
        BundleError: the bundle is damaged.
        EngineError: it has no programs.
        RuntimeMissing: Torch-TensorRT or TensorRT is not installed.
        BuildError: there is no GPU, a program cannot be compiled, or an engine is not in the program's precision.
    """
    compiler = compiler_here()
    manifest = Manifest.read(bundle)
    engines = {}
    for stage in manifest.stages:
        progress(f"building {stage.name} with {NAME}")
        engines[stage.name] = _build(compiler, bundle, stage, manifest.batch)
    return tensorrt.with_engines(bundle, manifest, NAME, engines)


def compiler_here() -> Any:
    """The module of Torch-TensorRT, where there is a GPU to compile for.

    Raises:
        RuntimeMissing: it is not installed.
        BuildError: there is no GPU.
    """
    try:
        compiler = importlib.import_module("torch_tensorrt")
    except (ImportError, OSError) as error:
        raise RuntimeMissing(f"{NAME} cannot be imported ({error}): pip install torch-tensorrt") from None
    tensorrt.capability()
    return compiler


def _build(compiler: Any, bundle: Path, stage: StageSpec, batch: Batch) -> Path:
    file, trt = bundle / stage.file, library("tensorrt")
    archive = engine_store.find(file, "torch", version(), suffix=SUFFIX)
    rows = (batch.min, batch.opt, batch.max)
    flags = ("STRONGLY_TYPED", "NO_TF32", f"{NAME} {compiler.__version__}")
    info = EngineInfo(engine_store.digest(file), NAME, trt.__version__, (tensorrt.capability(),), rows, flags)

    def compiled() -> tuple[bytes, float | None]:
        program = move_to_device_pass(pt2.read(archive), "cuda")
        try:
            plan = compiler.dynamo.convert_exported_program_to_serialized_trt_engine(
                program,
                arg_inputs=[_input(compiler, tensor.shape, rows) for tensor in stage.inputs],
                use_explicit_typing=True,  # the precision is the program's
                disable_tf32=True,
            )
        except Exception as error:  # most likely an operator without a converter
            raise BuildError(f"{file}: {NAME} cannot compile its program: {error}") from error
        half = any(tensor.dtype == torch.float16 for tensor in program.state_dict.values())
        return bytes(plan), tensorrt.proven_half(trt, file, bytes(plan)) if half else None

    names = {"inputs": [t.name for t in stage.inputs], "outputs": [t.name for t in stage.outputs]}
    return tensorrt.cached(file, bundle / engine_store.FOLDER, info, compiled, **names)


def _input(compiler: Any, shape: tuple[int | str, ...], rows: tuple[int, int, int]) -> Any:
    """The range of shapes of an input."""
    least, usual, most = (tuple(n if size == "B" else int(size) for size in shape) for n in rows)
    if least == most:
        return compiler.Input(shape=most, dtype=torch.float32)
    return compiler.Input(min_shape=least, opt_shape=usual, max_shape=most, dtype=torch.float32)
