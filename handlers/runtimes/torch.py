"""PyTorch: the modules that were traced to ONNX, as programs of `torch.export`, on an NVIDIA GPU or else the CPU.

The part that needs a GPU has never been run: none was at hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from handlers.runtimes import Array, Engine, EngineError, Options, engine_store, pt2
from handlers.runtimes.cuda_graphs import CudaGraphs, Tensors

SUFFIX = ".pt2"


def version() -> str:
    """PyTorch's, whatever it was compiled for: a program is the same for all."""
    return str(torch.__version__).partition("+")[0]


def load(file: Path, options: Options) -> Engine:
    """The program that was written with the graph ``file``; on the GPU, if there is one.

    Raises:
        EngineError: there is none of this graph and PyTorch, or it is not plain.
    """
    path = engine_store.find(file, "torch", version(), suffix=SUFFIX)
    info = engine_store.read_info(path)
    program = pt2.read(path)
    if not torch.cuda.is_available():
        if options.threads:
            torch.set_num_threads(options.threads)
        return CpuProgram(Function(program.module(check_guards=False), info["inputs"], info["outputs"]))
    without_tf32()
    device = torch.device("cuda", options.device)
    module = move_to_device_pass(program, str(device)).module(check_guards=False)
    function = Function(module, info["inputs"], info["outputs"])
    return CudaGraphs(lambda inputs: OnDevice(function, inputs), device)


def without_tf32() -> None:
    """TF32 keeps ten bits: less than fp32, and less than the fp32 regions of a half-precision program are there for."""
    # Not by the newer ``fp32_precision``: once that is set, whatever reads ``allow_tf32`` fails, torch.export included.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@dataclass(frozen=True)
class Function:
    """A module as a function of named tensors; ``inputs`` are in the order of its arguments."""

    module: Any
    inputs: list[str]
    outputs: list[str]

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensors:
        result = self.module(*(tensors[name] for name in self.inputs))
        return dict(zip(self.outputs, (result,) if isinstance(result, Tensor) else result, strict=True))


class CpuProgram:
    """A program on the CPU; inputs and outputs are numpy arrays."""

    def __init__(self, function: Function) -> None:
        self._function = function

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            with torch.no_grad():
                # Copied, for PyTorch has no read-only tensors.
                tensors = {name: torch.from_numpy(np.array(a, np.float32, order="C")) for name, a in inputs.items()}
                return {name: tensor.numpy() for name, tensor in self._function(tensors).items()}
        except Exception as error:  # PyTorch checks inputs with assertions and value errors, too
            raise EngineError(f"PyTorch: {error}") from error

    def close(self) -> None:
        del self._function


@dataclass(frozen=True)
class OnDevice:
    """A program on inputs that stay where they are, for `CudaGraphs`."""

    function: Function
    inputs: Tensors

    def start(self) -> Tensors:
        return self.function(self.inputs)

    def may_record(self) -> bool:
        return True
