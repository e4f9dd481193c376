"""Runtimes: the libraries that execute a bundle's engine files, each imported only when it is used.

A runtime is a module of this package with a function ``load(file, options) -> Engine``; what shares an API shares one.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from handlers.errors import MlvgmError

# numpy's, or a runtime's own that stays on its device and understands ``array[rows]`` and ``np.asarray(array)``; its
# ``finite()`` tells, row by row, whether all of its numbers are, and ``followed_by(others)`` joins it with more rows.
Array = Any


class RuntimeMissing(MlvgmError):
    """The wanted runtime does not exist, is not installed, or finds no device."""


class EngineError(MlvgmError):
    """An engine file cannot be loaded or run."""


class Engine(Protocol):
    """One loaded stage."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for ``inputs``, by name; the batch axis comes first and is as long as that of the inputs."""

    def close(self) -> None:
        """Free everything the engine holds; it cannot run any more."""


@dataclass(frozen=True)
class Options:
    """What a runtime may be told.

    Attributes:
        threads: CPU threads per engine; 0 lets the runtime use every core it may run on.
        device: number of the GPU, for the runtimes that use one.
        precision: of the bundle, "fp32", "fp16" or "bf16"; a runtime must not compute less precisely than that.
    """

    threads: int = 0
    device: int = 0
    precision: str = "fp32"


@dataclass(frozen=True)
class _Runtime:
    module: str
    package: str
    install: str
    distribution: str = ""  # needed beyond the package: one import name can come in several builds
    gpu: bool = False
    arguments: Mapping[str, str] = field(default_factory=dict)  # of the module's ``load``


_RUNTIMES = {
    "onnxruntime": _Runtime("handlers.runtimes.onnxruntime", "onnxruntime", "pip install onnxruntime"),
    "openvino": _Runtime("handlers.runtimes.openvino", "openvino", "pip install openvino"),
    "onnxruntime-cuda": _Runtime(
        "handlers.runtimes.onnxruntime_cuda", "onnxruntime", "pip install onnxruntime-gpu", "onnxruntime-gpu", True
    ),
    "torch": _Runtime("handlers.runtimes.torch", "torch", "pip install torch", gpu=True),
    "tensorrt": _Runtime("handlers.runtimes.tensorrt", "tensorrt", "pip install tensorrt", gpu=True),
    "torch-tensorrt": _Runtime(
        "handlers.runtimes.tensorrt",
        "tensorrt",
        "pip install tensorrt",
        gpu=True,
        arguments={"compiler": "torch-tensorrt"},
    ),
    "tensorrt-rtx": _Runtime(
        "handlers.runtimes.tensorrt",
        "tensorrt_rtx",
        "pip install tensorrt-rtx",
        gpu=True,
        arguments={"name": "tensorrt-rtx"},
    ),
}
_AUTO = ("openvino", "onnxruntime")  # on a CPU, as measured with every recipe: the faster first

ON_CPU = ("onnxruntime", "openvino")

NAMES = ("auto", *_RUNTIMES)


def installed() -> list[str]:
    """The runtimes whose library is installed, without importing any."""
    return [name for name, runtime in _RUNTIMES.items() if _is_installed(runtime)]


def available() -> list[str]:
    """Those of `installed` that have what they run on: a library for GPUs is of no use without one."""
    gpu = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))  # Linux, and Linux under Windows
    return [name for name in installed() if gpu or not _RUNTIMES[name].gpu]


def choose(name: str) -> str:
    """``name`` itself, or for "auto" the fastest installed runtime.

    Raises:
        RuntimeMissing: unknown or not installed, with what to install.
    """
    if name == "auto":
        found = [candidate for candidate in _AUTO if _is_installed(_RUNTIMES[candidate])]
        if not found:
            cures = " or ".join(_RUNTIMES[candidate].install for candidate in _AUTO)
            raise RuntimeMissing(f"no runtime is installed: {cures}")
        return found[0]
    if name not in _RUNTIMES:
        raise RuntimeMissing(f"no runtime is called {name!r}; there are {', '.join(NAMES)}")
    if not _is_installed(_RUNTIMES[name]):
        raise RuntimeMissing(f"runtime {name!r} is not installed: {_RUNTIMES[name].install}")
    return name


def _is_installed(runtime: _Runtime) -> bool:
    if importlib.util.find_spec(runtime.package) is None:
        return False
    try:
        return not runtime.distribution or bool(importlib.metadata.version(runtime.distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


def load(name: str, file: Path, options: Options) -> Engine:
    """Load an engine file with the runtime ``name``, as returned by `choose`.

    Raises:
        RuntimeMissing: the runtime's library or device cannot be used.
        EngineError: the runtime refuses the file.
    """
    runtime = _RUNTIMES[name]
    try:
        module = importlib.import_module(runtime.module)
    except ImportError as error:
        raise RuntimeMissing(f"runtime {name!r} cannot be imported ({error}): {runtime.install}") from error
    engine: Engine = module.load(file, options, **runtime.arguments)
    return engine
