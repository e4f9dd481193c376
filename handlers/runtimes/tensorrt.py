"""TensorRT and TensorRT-RTX on an NVIDIA GPU. The part that needs a GPU has never been run: none was at hand.

Engines are built by `export.tensorrt` and lie in the folder ``engines`` of the bundle, each with a JSON file that says
what it is. One built from another graph, by another version or for another GPU is never loaded. Outputs stay on the
device between stages; PyTorch holds the memory.
"""

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from handlers.runtimes import Array, EngineError, Options, RuntimeMissing

FOLDER = "engines"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def library(name: str) -> ModuleType:
    """The module of "tensorrt" or "tensorrt-rtx": one API under two names.

    Raises:
        RuntimeMissing: it is not installed or cannot be imported.
    """
    try:
        return importlib.import_module(MODULES[name])
    except (ImportError, OSError) as error:
        raise RuntimeMissing(f"runtime {name!r} cannot be imported ({error}): pip install {name}") from None


def digest(file: Path) -> str:
    """SHA-256 of a graph, its external weights included."""
    found = hashlib.sha256()
    for path in (file, file.with_name(f"{file.name}.data")):
        if path.is_file():
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def find(file: Path, name: str, version: str, target: str) -> Path:
    """The engine of the graph ``file`` for a GPU ("9.0"), among those beside it.

    Raises:
        EngineError: there is none that is of this very graph, library and GPU, and undamaged.
    """
    graph = digest(file)
    for path in sorted((file.parent / FOLDER).glob(f"{file.stem}-*.json")):
        try:
            card, engine = json.loads(path.read_text()), path.with_suffix(".engine")
            fits = (card["graph"], card["library"], card["version"]) == (graph, name, version)
            if fits and target in card["targets"] and hashlib.sha256(engine.read_bytes()).hexdigest() == card["engine"]:
                return engine
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half written or not ours: as good as none
    raise EngineError(
        f"{file}: no engine of it by {name} {version} for a GPU of compute capability {target}; "
        f"mlvgm export --engines {name} builds one"
    )


def load(file: Path, options: Options, name: str = "tensorrt") -> "TensorRtEngine":
    """The engine that was built from ``file`` for this GPU.

    Raises:
        RuntimeMissing: the library, PyTorch with CUDA, or the GPU is missing.
        EngineError: no engine fits, or the library refuses it.
    """
    trt, torch = library(name), _torch(name)
    with torch.cuda.device(options.device):
        target = ".".join(map(str, torch.cuda.get_device_capability()))
        path = find(file, name, trt.__version__, target)
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineError(f"{path}: {name} cannot load it; build it again on this machine")
        return TensorRtEngine(trt, torch, runtime, engine, options.device)


def _torch(name: str) -> ModuleType:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise RuntimeMissing(f"runtime {name!r} needs PyTorch with CUDA for its buffers: pip install torch") from None
    if not torch.cuda.is_available():
        raise RuntimeMissing(f"runtime {name!r} finds no NVIDIA GPU: check the driver and PyTorch's CUDA build")
    return torch


class DeviceArray:
    """A CUDA tensor that can be cut to rows where it is, and is copied to the host only by ``np.asarray``."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, rows: Any) -> "DeviceArray":
        return DeviceArray(self.tensor[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self.tensor.cpu().numpy(), dtype)


class TensorRtEngine:
    """One engine with one execution context on one stream; not for several threads at a time."""

    def __init__(self, trt: ModuleType, torch: Any, runtime: Any, engine: Any, device: int) -> None:
        self._trt, self._torch, self._runtime, self._engine = trt, torch, runtime, engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineError("TensorRT cannot make an execution context: most likely too little GPU memory")
        self._device = torch.device("cuda", device)
        self._stream = torch.cuda.Stream(self._device)
        self._names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        torch, kept, outputs = self._torch, {}, {}
        with torch.cuda.stream(self._stream):
            for name in self._of(self._trt.TensorIOMode.INPUT):
                value = inputs[name]
                if not isinstance(value, DeviceArray):
                    value = DeviceArray(torch.from_numpy(np.ascontiguousarray(value, np.float32)).to(self._device))
                kept[name] = value.tensor.contiguous()
                if not self._context.set_input_shape(name, tuple(kept[name].shape)):
                    raise EngineError(f"TensorRT: {name} cannot have the shape {tuple(kept[name].shape)}")
                self._context.set_tensor_address(name, kept[name].data_ptr())
            for name in self._of(self._trt.TensorIOMode.OUTPUT):
                shape = tuple(self._context.get_tensor_shape(name))
                outputs[name] = torch.empty(shape, dtype=torch.float32, device=self._device)
                self._context.set_tensor_address(name, outputs[name].data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise EngineError("TensorRT: the engine could not be run")
        self._stream.synchronize()
        return {name: DeviceArray(tensor) for name, tensor in outputs.items()}

    def close(self) -> None:
        del self._context, self._engine, self._runtime

    def _of(self, mode: Any) -> list[str]:
        return [name for name in self._names if self._engine.get_tensor_mode(name) == mode]
