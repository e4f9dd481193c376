"""Runtimes: the libraries that run a bundle's stages. Each is imported only when it is used.

A runtime is a module of this package with a function ``load(file, options) -> Engine``; runtimes with the same API
share a module.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from handlers import packages
from handlers.errors import MlvgmError

# OpenVINO tells Google Analytics that it is imported, unless this package of its is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

Array = Any  # a numpy array, or one that stays on a device, with the methods of `handlers.runtimes.device.DeviceArray`


class RuntimeMissing(MlvgmError):
    """A runtime does not exist, is not installed, or finds no device."""


class EngineError(MlvgmError):
    """An engine file cannot be loaded or run."""


@contextlib.contextmanager
def engine_errors(about: str, raised: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """Turn exceptions of a library into EngineErrors, in a ``with`` statement or as the decorator of a function.

    Args:
        about: what the message begins with: the library, or a file and what is wrong with it.
        raised: the exceptions. ONNX Runtime's share no narrower class, and PyTorch may raise anything.
    """
    try:
        yield
    except EngineError:
        raise
    except raised as error:
        raise EngineError(f"{about}: {error}") from error


class Engine(Protocol):
    """One loaded stage."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for ``inputs``, by name. The batch axis is the first, and has the length of the inputs' batch."""

    def close(self) -> None:
        """Free the engine's memory; it cannot be run again."""


@dataclass(frozen=True)
class EngineOptions:
    """Options of `load`, for every runtime.

    Attributes:
        threads: CPU threads per engine; 0 for every core that the process may use.
        device: number of the GPU, for runtimes that use one.
        precision: of the bundle, "fp32", "fp16" or "bf16". A runtime must not compute in a lower precision.
        compiled: batch sizes whose first run may take a compiler's minute, so that later ones are faster.
        digest: of the graph and its external weights (`handlers.manifest.Manifest.graph_digest`); "" if it is unknown.
            What is compiled of a graph is kept under its digest for later starts (`handlers.runtimes.cache`).
    """

    threads: int = 0
    device: int = 0
    precision: str = "fp32"
    compiled: tuple[int, ...] = ()
    digest: str = ""


@dataclass(frozen=True)
class _Runtime:
    module: str  # of this package
    package: str
    distribution: str = ""  # on PyPI, where several distributions have the same package
    gpu: bool = False
    arguments: Mapping[str, str] = field(default_factory=dict)  # of the module's ``load``

    @property
    def install(self) -> str:
        return f"pip install {self.distribution or self.package.replace('_', '-')}"


_RUNTIMES = {
    "onnxruntime": _Runtime("onnxruntime", "onnxruntime"),
    "openvino": _Runtime("openvino", "openvino"),
    "onnxruntime-cuda": _Runtime("onnxruntime_cuda", "onnxruntime", "onnxruntime-gpu", gpu=True),
    "torch": _Runtime("torch", "torch", gpu=True),
    "tensorrt": _Runtime("tensorrt", "tensorrt", gpu=True),
    "torch-tensorrt": _Runtime("tensorrt", "tensorrt", gpu=True, arguments={"compiler": "torch-tensorrt"}),
    "tensorrt-rtx": _Runtime("tensorrt", "tensorrt_rtx", gpu=True, arguments={"name": "tensorrt-rtx"}),
}
_AUTO = ("openvino", "onnxruntime")  # the faster first, as measured on CPUs with every recipe

ON_CPU = ("onnxruntime", "openvino")

NAMES = ("auto", *_RUNTIMES)


def installed() -> list[str]:
    """The runtimes whose library is installed. None is imported."""
    return [name for name, runtime in _RUNTIMES.items() if _is_installed(runtime)]


def available() -> list[str]:
    """The `installed` runtimes without those for GPUs if this machine has no GPU."""
    gpu = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))  # Linux, and Linux under Windows
    return [name for name in installed() if gpu or not _RUNTIMES[name].gpu]


def candidates() -> list[str]:
    """The installed runtimes that "auto" can be, the usually faster first."""
    return [name for name in _AUTO if _is_installed(_RUNTIMES[name])]


def choose(name: str) -> str:
    """``name`` itself, or for "auto" the usually fastest installed runtime (`handlers.runtimes.choice` has measured).

    Raises:
        RuntimeMissing: the runtime is unknown or not installed; the message says what to install.
    """
    if name == "auto":
        if not (found := candidates()):
            commands = " or ".join(_RUNTIMES[candidate].install for candidate in _AUTO)
            raise RuntimeMissing(f"no runtime is installed: {commands}")
        return found[0]
    if name not in _RUNTIMES:
        raise RuntimeMissing(f"unknown runtime {name!r}; known are {', '.join(NAMES)}")
    if not _is_installed(_RUNTIMES[name]):
        raise RuntimeMissing(f"runtime {name!r} is not installed: {_RUNTIMES[name].install}")
    return name


def _is_installed(runtime: _Runtime) -> bool:
    if importlib.util.find_spec(runtime.package) is None:
        return False
    return not runtime.distribution or packages.version(runtime.distribution) is not None


def load(name: str, file: Path, options: EngineOptions) -> Engine:
    """Load the stage ``file`` with the runtime ``name``, which is one that `choose` returned.

    Raises:
        RuntimeMissing: the runtime's library or device cannot be used.
        EngineError: the runtime refuses the file.
    """
    runtime = _RUNTIMES[name]
    try:
        module = importlib.import_module(f"handlers.runtimes.{runtime.module}")
    except ImportError as error:
        raise RuntimeMissing(f"runtime {name!r} cannot be imported ({error}): {runtime.install}") from error
    return module.load(file, options, **runtime.arguments)
