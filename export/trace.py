"""A stage as a program of `torch.export` and as an ONNX file, both with a dynamic batch axis."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.onnx_graph import save_graph
from export.probe import first_line
from export.stage import Stage
from export.weights import halve
from handlers.errors import MlvgmError
from handlers.manifest import Stored, TensorSpec

_TRACE_BATCH = 7  # an odd size that no other axis has, so that nothing is mistaken for the batch


class TraceError(MlvgmError):
    """A stage cannot be traced, or its graph is not what was asked for."""


def example(spec: TensorSpec, batch: int, seed: int = 0) -> Tensor:
    """A plausible value for an input: images in [0, 1], alphas in (0, 1), everything else standard normal."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [batch if size == "B" else int(size) for size in spec.shape]
    draw = torch.rand if spec.name in ("images", "alphas") else torch.randn
    return draw(sizes, generator=generator)


def program(stage: Stage) -> ExportedProgram:
    """``stage`` as a function of its inputs, in their order.

    Raises:
        TraceError: the stage came as an ONNX graph, or cannot be exported.
    """
    module = stage.module()
    if isinstance(module, ir.Model):
        raise TraceError(f"stage {stage.name} came as an ONNX graph, of which PyTorch cannot make a program")
    inputs = tuple(example(spec, _TRACE_BATCH) for spec in stage.inputs)
    with _errors_of(stage), torch.no_grad():
        return torch.export.export(_Arguments(module).eval(), inputs, dynamic_shapes=_axes(stage))


def trace(stage: Stage, file: Path, weights: Stored = "fp32") -> dict[str, str]:
    """Write the graph of ``stage`` to ``file`` (and to ``file``.data if its weights are too large for one file).

    Returns:
        Which large weights are not stored in ``weights`` but stay in fp32, and why (`export.weights.halve`).

    Raises:
        TraceError: the stage cannot be exported, its graph has other inputs or outputs, or it has a random operator.
    """
    model = _graph(stage)
    kept = {} if weights == "fp32" else halve(model, weights)
    save_graph(model, file)
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
    return kept


def _graph(stage: Stage) -> ir.Model:
    if stage.is_graph:
        return cast(ir.Model, stage.module())
    traced = program(stage)
    with _errors_of(stage), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            traced,
            dynamo=True,
            input_names=[spec.name for spec in stage.inputs],
            output_names=[spec.name for spec in stage.outputs],
            dynamic_shapes=_axes(stage),
            verbose=False,
        )
    assert exported is not None
    return exported.model


def _axes(stage: Stage) -> tuple[tuple[dict[int, torch.export.Dim] | None, ...]]:
    """The dynamic axes of the inputs: the batch, where there is one."""
    batch = torch.export.Dim("B", min=1)
    return (tuple({0: batch} if spec.batched else None for spec in stage.inputs),)


class _Arguments(nn.Module):
    """Takes any number of tensors, so that one structure of dynamic shapes fits every stage."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.module(*tensors)


@contextlib.contextmanager
def _errors_of(stage: Stage) -> Iterator[None]:
    """Turns what the exporter raises into a TraceError of one line, and silences what it logs."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except Exception as error:
        raise TraceError(f"stage {stage.name} cannot be exported: {first_line(error.__cause__ or error)}") from error
    finally:
        logging.disable(level)
