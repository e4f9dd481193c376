"""Hardware and versions of this machine, for reports."""

import importlib.metadata
import platform
from typing import Any

from handlers import cores

PACKAGES = (
    *("torch", "numpy", "pillow", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"),
    *("foolbox", "adversarial-robustness-toolbox", "torchserve", "uvicorn"),
)


def describe() -> dict[str, Any]:
    """Processor, usable cores, Python, and the version of each of `PACKAGES` that is installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": cores.usable(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _processor() -> str:
    lines = (line.partition(":") for line in cores.kind().splitlines())
    named = (value.strip() for name, _, value in lines if name.strip() == "model name")
    return next(named, platform.processor() or platform.machine())
