"""ONNX graphs that others wrote: read, changed and saved, with weights of any size in files of their own."""

from collections.abc import Iterator, Mapping
from io import BufferedWriter
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, external_data_helper, numpy_helper

INLINE_BYTES = 1_500_000_000
"""Weights of more lie in a file of their own: one protocol-buffer file holds at most 2 GB."""

_BLOCK = 1 << 24


def load_graph(file: Path) -> ModelProto:
    """The graph in ``file``, checked. External weights of `INLINE_BYTES` or more stay where they are, by absolute path.

    Raises:
        Exception: whatever onnx and protobuf raise.
    """
    onnx.checker.check_model(str(file))
    model = onnx.load(str(file), load_external_data=False)
    external = list(_external(model))
    if sum(_place(tensor, file.parent)[2] for tensor in external) < INLINE_BYTES:
        external_data_helper.load_external_data_for_model(model, str(file.parent))
    else:
        for tensor in external:
            _put(tensor, *_place(tensor, file.parent))
    return model


def save_graph(model: ModelProto, file: Path) -> None:
    """Write ``model``; weights that lie in other files, or are too large for this one, go to ``file``.data."""
    data = file.with_name(f"{file.name}.data")
    if external := list(_external(model)):
        with data.open("wb") as target:
            for tensor in external:
                _copy(tensor, target, data.name)
    onnx.save(
        model,
        str(file),
        save_as_external_data=not external and model.ByteSize() > INLINE_BYTES,
        location=data.name,
    )


def rename(model: ModelProto, names: Mapping[str, str]) -> None:
    """Give tensors other names, in subgraphs too: these see the names around them."""
    for graph in graphs(model.graph):
        for node in graph.node:
            for places in (node.input, node.output):
                places[:] = [names.get(name, name) for name in places]
        for value in (*graph.input, *graph.output, *graph.initializer, *(t.values for t in graph.sparse_initializer)):
            value.name = names.get(value.name, value.name)


def free_batch(model: ModelProto, batch: int) -> None:
    """Write shapes that begin with the fixed ``batch`` so that they begin with whatever the batch is."""
    graph = model.graph
    shapes = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    constants = {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    for name, tensor in {**constants, **{tensor.name: tensor for tensor in graph.initializer}}.items():
        if name in shapes and (shape := numpy_helper.to_array(tensor)).size and shape[0] == batch:
            first = 0 if -1 in shape else -1  # 0 keeps that side as it is, -1 takes what is left
            tensor.CopyFrom(numpy_helper.from_array(np.array([first, *shape[1:]], np.int64), tensor.name))


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """``graph`` and all those within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from graphs(inner)


def nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Every node, those of subgraphs and local functions too."""
    for graph in graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _external(model: ModelProto) -> Iterator[TensorProto]:
    for graph in graphs(model.graph):
        for tensor in graph.initializer:
            if external_data_helper.uses_external_data(tensor):
                yield tensor


def _place(tensor: TensorProto, folder: Path) -> tuple[Path, int, int]:
    """Where a tensor's bytes lie: the file, the first of them, and how many."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path, offset = folder.resolve() / entries["location"], int(entries.get("offset", 0))
    return path, offset, int(entries.get("length", path.stat().st_size - offset))


def _put(tensor: TensorProto, location: Path, offset: int, length: int) -> None:
    tensor.raw_data = b""  # which `set_external_data` asks for
    external_data_helper.set_external_data(tensor, str(location), offset, length)
    tensor.ClearField("raw_data")


def _copy(tensor: TensorProto, target: BufferedWriter, location: str) -> None:
    """Append the tensor's bytes to ``target``, whose name is ``location``, and let the tensor say so."""
    path, offset, length = _place(tensor, Path("/"))
    begun, left = target.tell(), length
    with path.open("rb") as source:
        source.seek(offset)
        while left and (block := source.read(min(left, _BLOCK))):
            target.write(block)
            left -= len(block)
    if left:
        raise OSError(f"{path}: {left} bytes are missing: truncated")
    _put(tensor, Path(location), begun, length)
