"""TensorRT-RTX: TensorRT's API in a library for workstation GPUs."""

from pathlib import Path

from handlers.runtimes import Options, tensorrt


def load(file: Path, options: Options) -> tensorrt.TensorRtEngine:
    """As `handlers.runtimes.tensorrt.load`."""
    return tensorrt.load(file, options, "tensorrt-rtx")
