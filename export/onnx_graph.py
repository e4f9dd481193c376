"""Read, extend and save ONNX graphs with weights of any size, without loading external weights into memory."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import external_data_helper, version_converter

INLINE_BYTES = 64_000_000
"""Larger weights are saved as external data, which runtimes map instead of reading it into memory. One file of protocol
buffers could hold 2 GB."""

_OLDEST_OPSET = 8  # the first in which all operators broadcast alike


def load_graph(file: Path) -> ir.Model:
    """The graph in ``file``, checked, in opset 8 or later; external weights are memory-mapped.

    Raises:
        Exception: anything that onnx and protobuf raise.
    """
    onnx.checker.check_model(str(file))
    model = onnx.load(str(file), load_external_data=False)
    if model.graph.sparse_initializer:
        raise ValueError("it has sparse initializers")
    if any(entry.domain in ("", "ai.onnx") and entry.version < _OLDEST_OPSET for entry in model.opset_import):
        external_data_helper.load_external_data_for_model(model, str(file.parent))
        model = version_converter.convert_version(model, 13)
    loaded = ir.from_proto(model)
    ir.external_data.set_base_dir(loaded.graph, file.resolve().parent)
    return loaded


def save_graph(model: ir.Model, file: Path) -> None:
    """Write ``model`` to ``file``; weights of more than `INLINE_BYTES` go to ``file``.data beside it."""
    weights = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    if sum(weight.nbytes for weight in weights if weight is not None) > INLINE_BYTES:
        ir.save(model, file, external_data=f"{file.name}.data")
    else:
        ir.save(ir.external_data.load_to_model(model), file)


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node, including those of subgraphs and local functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def values(model: ir.Model) -> Iterator[ir.Value]:
    """Every tensor of the graph and its subgraphs."""
    for graph in model.graphs():
        yield from (*graph.inputs, *graph.initializers.values())
    for node in model.graph.all_nodes():
        yield from node.outputs


def declare(value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """``value``, with a name, an element type and a shape: to be an output of a graph."""
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return value


class Writer:
    """Adds nodes to the end of ``graph``; the names of their outputs and weights begin with "mlvgm/"."""

    def __init__(self, graph: ir.Graph) -> None:
        self._tape, self._numbers = ir.tape.Tape(graph), itertools.count()

    def node(self, operator: str, *inputs: Any, **attributes: Any) -> ir.Value:
        """The output of a new node. Inputs that are numbers or arrays become weights, as in `weight`."""
        tensors = [given if isinstance(given, ir.Value) else self.weight(given) for given in inputs]
        return self._tape.op(operator, tensors, attributes, output=ir.val(self._name()))

    def weight(self, value: Any) -> ir.Value:
        """A constant tensor: whole numbers as int64, others as float32."""
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        return self._tape.initializer(ir.tensor(array), self._name())

    def _name(self) -> str:
        return f"mlvgm/{next(self._numbers)}"


def free_batch(model: ir.Model, batch: int) -> None:
    """Make the targets of Reshape operators independent of the fixed ``batch`` with which they begin."""
    for node in list(model.graph):
        shape = node.inputs[1] if node.op_type == "Reshape" else None
        tensor = ir.convenience.get_const_tensor(shape) if shape is not None else None
        if tensor is not None and (sizes := tensor.numpy()).size and sizes[0] == batch:
            first = 0 if -1 in sizes else -1  # 0 keeps that side as it is, -1 takes what is left
            freed = ir.tensor(np.array([first, *sizes[1:]], np.int64), name=f"{node.outputs[0].name}/shape")
            node.replace_input_with(1, ir.tape.Tape(model.graph).initializer(freed))
