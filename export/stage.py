"""What an export consists of: stages, each with the reference it is compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx
from torch import Tensor, nn

from handlers.manifest import TensorSpec


@dataclass(frozen=True)
class Stage:
    """One graph of a pipeline.

    Attributes:
        name: "encode", "resample", "decode" or "classify"; another name is as good, the order is what counts.
        module: makes the form that is traced: rewritten for speed, a function of ``inputs`` in their order. Made only
            when it is traced, for it may hold gigabytes. A stage that is an ONNX graph already is written as it is.
        reference: the published operators, a function of the same inputs, with which the traced form must agree.
        inputs, outputs: known names are ``images``, ``input_noise``, ``noise`` (all latents at once),
            ``noise_0``, ``noise_1``, ... and ``alphas``; any other must be the output of a stage before.
        is_graph: ``module`` makes an ONNX graph, whose precision is its own.
        tolerance: relative error that it may have in any precision, because it makes small differences larger.
    """

    name: str
    module: Callable[[], nn.Module | onnx.ModelProto]
    reference: Callable[..., Tensor | Sequence[Tensor]]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    is_graph: bool = False
    tolerance: float = 0.0


def as_tuple(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of a stage as a tuple, even where there is one."""
    return (result,) if isinstance(result, Tensor) else tuple(result)
