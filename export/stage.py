"""A stage of the pipeline: the module to export, and the reference it is compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor, nn

from handlers.manifest import TensorSpec


@dataclass(frozen=True)
class Stage:
    """One graph of a pipeline.

    Attributes:
        name: such as "encode", "resample", "decode", "classify". Stages run in the order of the list, not by name.
        module: returns the module to trace, a function of ``inputs`` in their order, rewritten for speed; or an ONNX
            graph, which is written as it is. A function, because the module may hold gigabytes.
        reference: the published operators as a function of the same inputs; the traced module must agree with it.
        inputs, outputs: the pipeline provides ``images``, ``input_noise``, ``noise`` (all latents at once),
            ``noise_0``, ``noise_1``, ... and ``alphas``; any other input must be the output of an earlier stage.
        is_graph: ``module`` returns an ONNX graph, which keeps its own precision.
        tolerance: relative error allowed in any precision, for a stage that amplifies rounding errors.
    """

    name: str
    module: Callable[[], nn.Module | ir.Model]
    reference: Callable[..., Tensor | Sequence[Tensor]]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    is_graph: bool = False
    tolerance: float = 0.0


def as_tuple(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of a stage as a tuple, even if there is only one."""
    return (result,) if isinstance(result, Tensor) else tuple(result)
