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
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
