"""Weights stored in half precision: half the archive. The graph casts them to fp32 and computes as it did before."""

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

SMALL = 4096
"""Weights of fewer numbers stay in fp32, and so do vectors: biases and normalisation."""

_CHUNK = 1 << 24  # numbers that are looked at together
_BF16_OPSET = 13  # the first in which a Cast takes bf16


def halve(model: ir.Model, kind: str) -> dict[str, str]:
    """Store the large fp32 weights of ``model`` in ``kind``, "fp16" or "bf16".

    Returns:
        Why others stay in fp32, by name: numbers beyond the range of ``kind``, or so small that it loses digits.
    """
    half, graph, kept = HALF[kind], model.graph, {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or value.is_graph_output():
            continue
        if tensor.size < SMALL or len(tensor.shape) < 2:
            continue
        if reason := _objection(model, tensor, half, kind):
            kept[name] = reason
            continue
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
        cast.outputs[0].name, cast.outputs[0].type = f"{name}/fp32", ir.TensorType(ir.DataType.FLOAT)
        cast.outputs[0].shape = shape = ir.Shape(tensor.shape.numpy())
        for user, index in value.uses():
            if user is not cast:
                user.replace_input_with(index, cast.outputs[0])
        graph.insert_before(graph[0], cast)
        # Rounded again when it is written, so that the model is never in memory twice.
        value.const_value = ir.LazyTensor(partial(_rounded, tensor, half), half, shape, name=name)
        value.dtype = half
    return kept


def _rounded(tensor: ir.TensorProtocol, half: ir.DataType) -> ir.TensorProtocol:
    return ir.Tensor(_cast(tensor.numpy(), half), dtype=half, name=tensor.name)


def _cast(numbers: NDArray[Any], half: ir.DataType) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return numbers.astype(half.numpy())


def _objection(model: ir.Model, tensor: ir.TensorProtocol, half: ir.DataType, kind: str) -> str:
    """Why ``tensor`` cannot be stored so; "" if it can: its numbers are then rounded by half a last digit at most."""
    if kind == "bf16" and model.opset_imports.get("", _BF16_OPSET) < _BF16_OPSET:
        return f"its graph is of an opset before {_BF16_OPSET}, which cannot cast bf16"
    exact, norm, error = tensor.numpy().ravel(), 1e-30, 0.0
    for part in np.split(exact, range(_CHUNK, exact.size, _CHUNK)):
        found = _cast(part, half).astype(np.float32)
        if not np.isfinite(found).all():
            return f"its largest number, {max(exact.max(), -exact.min()):.1e}, is beyond {kind}"
        norm, error = np.hypot(norm, np.linalg.norm(part)), np.hypot(error, np.linalg.norm(found - part))
    error /= norm
    if error > (unit := 2.0 ** -(11 if kind == "fp16" else 8)):
        return f"its numbers are too small for {kind}, which would change them by {error:.0e} instead of {unit:.0e}"
    return ""
