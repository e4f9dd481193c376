"""A stage as a program of `torch.export`, with a dynamic batch axis: the very module that is traced to ONNX.

It lies beside the graph, in the folder ``engines``, and belongs to it: with another graph it is never loaded.
"""

import hashlib
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from export.stage import Stage
from export.trace import TRACE_BATCH, TraceError, example
from handlers.runtimes import engine_store, pt2
from handlers.runtimes.torch import SUFFIX, version


def program(stage: Stage) -> torch.export.ExportedProgram:
    """``stage`` as a function of its inputs in their order.

    Raises:
        TraceError: the stage came as an ONNX graph, or cannot be exported.
    """
    module = stage.module()
    if isinstance(module, onnx.ModelProto):
        raise TraceError(f"stage {stage.name} came as an ONNX graph, of which PyTorch cannot make a program")
    inputs = tuple(example(spec, TRACE_BATCH) for spec in stage.inputs)
    batch = torch.export.Dim("B", min=1)
    axes = tuple({0: batch} if spec.batched else None for spec in stage.inputs)
    try:
        with torch.no_grad():
            return torch.export.export(_Arguments(module).eval(), inputs, dynamic_shapes=(axes,))
    except Exception as error:
        raise TraceError(f"stage {stage.name} cannot be exported: {str(error).strip().splitlines()[0]}") from error


def write(stage: Stage, file: Path) -> Path:
    """Write the program of ``stage``, whose graph is ``file``, and what it is beside it; gives where it lies.

    Raises:
        TraceError: the stage came as an ONNX graph, or cannot be exported.
        EngineError: the archive is not plain.
    """
    made = program(stage)
    made.example_inputs = None  # they would be pickled
    graph = engine_store.digest(file)
    key = hashlib.sha256(f"{graph} {version()}".encode()).hexdigest()[:16]
    path = file.parent / engine_store.FOLDER / f"{file.stem}-{key}{SUFFIX}"
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are cut from one tensor: they are read back below
        torch.export.save(made, path)
    pt2.read(path)
    info = {"graph": graph, "library": "torch", "version": version(), "targets": [engine_store.ANY]}
    names = {"inputs": [spec.name for spec in stage.inputs], "outputs": [spec.name for spec in stage.outputs]}
    engine_store.write_info(path, info | names)
    return path


class _Arguments(nn.Module):
    """Takes any number of tensors, so that the exporter treats them all alike."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        result: Tensor | tuple[Tensor, ...] = self.module(*tensors)
        return result
