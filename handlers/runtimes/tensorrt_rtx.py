"""TensorRT-RTX: TensorRT's API in a library for workstation GPUs."""

from pathlib import Path

from handlers.runtimes import Engine, Options, tensorrt


def load(file: Path, options: Options) -> Engine:
    """As `handlers.runtimes.tensorrt.load`."""
    return tensorrt.load(file, options, "tensorrt-rtx")
