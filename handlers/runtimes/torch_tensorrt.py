"""Engines that Torch-TensorRT compiled from the programs of `export.engines.programs`; TensorRT alone runs them. Never run."""

from pathlib import Path

from handlers.runtimes import Engine, Options, tensorrt


def load(file: Path, options: Options) -> Engine:
    """As `handlers.runtimes.tensorrt.load`; a stage that Torch-TensorRT did not compile is TensorRT's own engine."""
    return tensorrt.load(file, options, compiler="torch-tensorrt")
