"""A classifier that is an ONNX file: checked, and given the project's input and output around its own graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
import torch
from onnx import TensorProto, compose, helper, numpy_helper
from torch import Tensor

from export.stage import Stage
from handlers.errors import MlvgmError
from mlvgm.recipe import ClassifierRecipe


class ClassifierError(MlvgmError, ValueError):
    """An ONNX file cannot serve as the classifier."""


def stage(file: Path, recipe: ClassifierRecipe, image_size: int, n_classes: int) -> Stage:
    """``classify`` of an ONNX file that takes normalised images (batch, 3, H, W) and returns logits (batch, C).

    Args:
        recipe: its ``mean`` and ``std``, by which images in [0, 1] are normalised inside the new graph.

    Raises:
        ClassifierError: naming the file and what is wrong with its input, output or batch axis.
    """
    try:
        model = onnx.load(str(file))
        onnx.checker.check_model(model)
    except Exception as error:  # onnx raises whatever protobuf raises
        raise ClassifierError(f"{file}: not a valid ONNX file ({_first_line(error)})") from None
    _check_signature(model, file, image_size, n_classes)
    twin = _Twin(file, recipe)
    for batch in (1, 2):
        shape = tuple(twin(torch.zeros(batch, 3, image_size, image_size)).shape)
        if shape != (batch, n_classes):
            raise ClassifierError(f"{file}: gives {shape} for {batch} images, not {(batch, n_classes)}")
    return Stage(
        "classify",
        lambda: _wrap(model, recipe, image_size, n_classes),
        twin,
        (("images", ("B", 3, image_size, image_size)),),
        (("logits", ("B", n_classes)),),
    )


class _Twin:
    """The user's file as it is, behind the normalisation: what the wrapped graph must agree with."""

    def __init__(self, file: Path, recipe: ClassifierRecipe) -> None:
        self.file = file
        self.session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (recipe.mean, recipe.std))

    def __call__(self, images: Tensor) -> Tensor:
        normalised = ((images - self.mean) / self.std).numpy()
        try:
            return torch.from_numpy(self.session.run(None, {self.session.get_inputs()[0].name: normalised})[0])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ClassifierError(f"{self.file}: cannot be run ({_first_line(error)})") from None


def _check_signature(model: Any, file: Path, image_size: int, n_classes: int) -> None:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    outputs = list(model.graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        raise ClassifierError(f"{file}: has {len(inputs)} inputs and {len(outputs)} outputs; it must have one of each")
    for kind, value, wanted in (
        ("input", inputs[0], (None, 3, image_size, image_size)),
        ("output", outputs[0], (None, n_classes)),
    ):
        tensor = value.type.tensor_type
        if tensor.elem_type != TensorProto.FLOAT:
            raise ClassifierError(f"{file}: its {kind} {value.name!r} is not float32")
        shape = [dim.dim_value or None for dim in tensor.shape.dim]
        fits = len(shape) == len(wanted) and all(a in (None, b) for a, b in zip(shape[1:], wanted[1:], strict=False))
        if not fits:
            raise ClassifierError(f"{file}: its {kind} {value.name!r} has shape {shape}, expected {list(wanted)}")
        if shape[0] is not None:
            raise ClassifierError(
                f"{file}: its {kind} {value.name!r} has a fixed batch of {shape[0]}: "
                "export it with a dynamic batch axis"
            )


def _wrap(model: Any, recipe: ClassifierRecipe, image_size: int, n_classes: int) -> Any:
    """``model`` between two nodes that normalise, and one that renames its output to ``logits``."""
    weights = {tensor.name for tensor in model.graph.initializer}
    model = compose.add_prefix(model, "classifier/")
    graph = model.graph
    inner = next(v.name for v in graph.input if v.name.removeprefix("classifier/") not in weights)
    constants = {
        name: numpy_helper.from_array(np.array(values, np.float32).reshape(1, 3, 1, 1), name)
        for name, values in (("mean", recipe.mean), ("std", recipe.std))
    }
    nodes = [
        helper.make_node("Sub", ["images", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], [inner]),
        *graph.node,
        helper.make_node("Identity", [graph.output[0].name], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", 3, image_size, image_size])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", n_classes])
    wrapped = helper.make_graph(nodes, "classify", [images], [logits], [*graph.initializer, *constants.values()])
    wrapped.sparse_initializer.extend(graph.sparse_initializer)
    made = helper.make_model(
        wrapped, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version
    )
    onnx.checker.check_model(made)
    return made


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
