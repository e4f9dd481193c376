"""TensorRT and TensorRT-RTX on an NVIDIA GPU (docs/gpu.md: what has been run).

Engines are built by `export.engines.tensorrt`, or by `export.engines.torch_tensorrt` for the runtime "torch-tensorrt".
Outputs stay on the GPU between stages; PyTorch holds the memory.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from handlers.runtimes import Engine, EngineError, EngineOptions, RuntimeMissing, engine_store

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def library(name: str) -> ModuleType:
    """The Python module of "tensorrt" or "tensorrt-rtx"; both have the same API.

    Raises:
        RuntimeMissing: it cannot be imported.
    """
    try:
        return importlib.import_module(MODULES[name])
    except (ImportError, OSError) as error:
        raise RuntimeMissing(f"runtime {name!r} cannot be imported ({error}): pip install {name}") from None


def load(file: Path, options: EngineOptions, name: str = "tensorrt", compiler: str = "") -> Engine:
    """The engine that was built from ``file`` for this GPU.

    Args:
        name: library that runs the engine, "tensorrt" or "tensorrt-rtx".
        compiler: library that built it, if that is another one.

    Raises:
        RuntimeMissing: the library, PyTorch with CUDA, or the GPU is missing.
        EngineError: there is no engine for this GPU, or the library refuses it.
    """
    trt, torch = library(name), _torch(name)
    from handlers.runtimes.tensorrt_engine import engine_of  # which needs PyTorch

    with torch.cuda.device(options.device):
        target = ".".join(map(str, torch.cuda.get_device_capability()))
        path = engine_store.find(file, compiler or name, trt.__version__, target)
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        plan = runtime.deserialize_cuda_engine(path.read_bytes())
        if plan is None:
            raise EngineError(f"{path}: {name} cannot load it; build it again on this machine")
        return engine_of(trt, runtime, plan, engine_store.read_info(path), torch.device("cuda", options.device))


def _torch(name: str) -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise RuntimeMissing(f"runtime {name!r} needs PyTorch with CUDA for its buffers: pip install torch") from None
    if not torch.cuda.is_available():
        raise RuntimeMissing(f"runtime {name!r} finds no NVIDIA GPU: check the driver and PyTorch's CUDA build")
    return torch
