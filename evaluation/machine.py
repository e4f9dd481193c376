"""Hardware and versions of this machine, for reports."""

import platform
import sys
from typing import Any

from handlers import cores, packages

PACKAGES = (
    *("torch", "numpy", "pillow", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"),
    *("foolbox", "adversarial-robustness-toolbox", "torchserve", "uvicorn"),
)


def describe() -> dict[str, Any]:
    """Processor, usable cores, GPU where PyTorch has one, Python, and the version of each of `PACKAGES` installed."""
    return {
        "processor": _processor(),
        "cores": cores.usable(),
        **_gpu(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := packages.version(name))},
    }


def _gpu() -> dict[str, str]:
    torch: Any = sys.modules.get("torch")  # where nobody has imported it, nothing ran on a GPU by it
    return {"gpu": torch.cuda.get_device_name()} if torch and torch.cuda.is_available() else {}


def _processor() -> str:
    lines = (line.partition(":") for line in cores.kind().splitlines())
    named = (value.strip() for name, _, value in lines if name.strip() == "model name")
    return next(named, platform.processor() or platform.machine())
