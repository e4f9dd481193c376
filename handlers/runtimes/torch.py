"""Exported programs of PyTorch (`torch.export`), on an NVIDIA GPU or the CPU (docs/gpu.md: what has been run)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from handlers.runtimes import Array, Engine, EngineOptions, engine_errors, engine_store, pt2
from handlers.runtimes.compiled import Compiled
from handlers.runtimes.cuda_graphs import Computation, CudaGraphs, Tensors

SUFFIX = ".pt2"


def version() -> str:
    """PyTorch's version without that of CUDA, which makes no difference to a program."""
    return str(torch.__version__).partition("+")[0]


def load(file: Path, options: EngineOptions) -> Engine:
    """The program of the graph ``file``, on the GPU if there is one.

    Raises:
        EngineError: there is no program of this graph and this version of PyTorch, or `pt2.read` refuses it.
    """
    path = engine_store.find(file, "torch", version(), suffix=SUFFIX)
    info = engine_store.read_info(path)
    program = pt2.read(path)
    if not torch.cuda.is_available():
        if options.threads:
            torch.set_num_threads(options.threads)
        return CpuProgram(Function(program.module(check_guards=False), info["inputs"], info["outputs"]))
    without_tf32()
    torch.backends.cudnn.benchmark = True  # there are few batch sizes, and warm-up runs each
    device = torch.device("cuda", options.device)
    module = channels_last(move_to_device_pass(program, str(device))).module(check_guards=False)
    function = Function(Compiled(module, options.compiled), info["inputs"], info["outputs"])
    return CudaGraphs(lambda inputs: Computation(partial(function, inputs)), device)


def without_tf32() -> None:
    """Turn off TF32: its mantissa of ten bits is too imprecise for fp32 programs, and for fp32 regions of fp16 ones."""
    # Not by the newer ``fp32_precision``: once that is set, code that reads ``allow_tf32`` fails, even torch.export.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def channels_last(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """``program`` with its filters channels last: otherwise cuDNN converts every fp16 feature map to that and back."""
    for name, tensor in program.state_dict.items():
        if tensor.ndim == 4:
            turned = tensor.detach().to(memory_format=torch.channels_last)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            program.state_dict[name] = torch.nn.Parameter(turned, requires_grad=False) if is_parameter else turned
    return program


@dataclass(frozen=True)
class Function:
    """A module as a function of named tensors; ``inputs`` and ``outputs`` are in the module's order."""

    module: Any
    inputs: list[str]
    outputs: list[str]

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensors:
        result = self.module(*(tensors[name] for name in self.inputs))
        return dict(zip(self.outputs, (result,) if isinstance(result, Tensor) else result, strict=True))


class CpuProgram:
    """An engine that runs a program on the CPU; inputs and outputs are numpy arrays."""

    def __init__(self, function: Function) -> None:
        self._function = function

    @engine_errors("PyTorch")
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            # Copied, because PyTorch has no read-only tensors.
            tensors = {name: torch.from_numpy(np.array(a, np.float32, order="C")) for name, a in inputs.items()}
            return {name: tensor.numpy() for name, tensor in self._function(tensors).items()}

    def close(self) -> None:
        del self._function
