"""A stage as an ONNX file, with a dynamic batch axis."""

import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from export.onnx_graph import INLINE_BYTES, save_graph
from export.stage import Stage
from handlers.errors import MlvgmError
from handlers.manifest import TensorSpec

TRACE_BATCH = 7
"""An odd size that no other axis has, so that nothing is mistaken for the batch. Tracing computes nothing."""


class TraceError(MlvgmError):
    """A stage cannot be traced, or its graph is not what was asked for."""


def example(spec: TensorSpec, batch: int, seed: int = 0) -> Tensor:
    """A plausible value for an input: images in [0, 1], weights in (0, 1), everything else standard normal."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [batch if size == "B" else int(size) for size in spec.shape]
    if spec.name in ("images", "alphas"):
        return torch.rand(sizes, generator=generator)
    return torch.randn(sizes, generator=generator)


def trace(stage: Stage, file: Path) -> None:
    """Write ``stage`` to ``file`` (and ``file``.data where the weights are too large for one file).

    Raises:
        TraceError: the stage cannot be exported, or its graph has other inputs, outputs or a random operator.
    """
    module = stage.module()
    if isinstance(module, onnx.ModelProto):
        save_graph(module, file)
        _check(stage, file)
        return
    inputs = tuple(example(spec, TRACE_BATCH) for spec in stage.inputs)
    batch = torch.export.Dim("B", min=1)
    axes = tuple({0: batch} if spec.batched else None for spec in stage.inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad(), _quiet():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _OneArgument(module).eval(),
                (inputs,),
                dynamo=True,
                input_names=[spec.name for spec in stage.inputs],
                output_names=[spec.name for spec in stage.outputs],
                dynamic_shapes=(axes,),
                verbose=False,
            )
    except Exception as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise TraceError(f"stage {stage.name} cannot be exported: {reason[0]}") from error
    assert program is not None
    weights = sum(p.numel() * p.element_size() for p in [*module.parameters(), *module.buffers()])
    program.save(str(file), external_data=weights > INLINE_BYTES)
    _check(stage, file)


class _OneArgument(nn.Module):
    """Takes all tensors as one tuple: the exporter then treats any number of them alike."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tensors: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        result: Tensor | tuple[Tensor, ...] = self.module(*tensors)
        return result


def _check(stage: Stage, file: Path) -> None:
    onnx.checker.check_model(str(file))
    graph = onnx.load(str(file), load_external_data=False).graph
    for kind, wanted, found in (("input", stage.inputs, graph.input), ("output", stage.outputs, graph.output)):
        expected = [(spec.name, len(spec.shape)) for spec in wanted]
        actual = [(value.name, len(value.type.tensor_type.shape.dim)) for value in found]
        if expected != actual:
            raise TraceError(f"stage {stage.name}: its graph has the {kind}s {actual}, expected {expected}")
    random = [node.op_type for node in graph.node if node.op_type.startswith("Random") or node.op_type == "Bernoulli"]
    if random:
        raise TraceError(f"stage {stage.name}: its graph draws random numbers ({random[0]}); noise must be an input")


class _quiet:
    """The exporter logs its own progress; an export has a progress line of its own."""

    def __enter__(self) -> None:
        self.level = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self.level)
