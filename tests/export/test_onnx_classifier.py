"""A user's ONNX classifier goes in as it is, or is refused with the reason."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, checker, helper, numpy_helper, save

from export.onnx_classifier import ClassifierError, stage
from export.stage import Stage
from export.trace import trace
from mlvgm.recipe import ClassifierRecipe

RECIPE = ClassifierRecipe("onnx", mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))


def write(path: Path, batch: object = "N", size: object = 8, classes: int = 2, dtype: int = TensorProto.FLOAT) -> Path:
    """Mean over the pixels of each colour, times a matrix; its tensors carry the names the wrapper uses."""
    matrix = np.arange(3 * classes, dtype=np.float32).reshape(3, classes) - 2
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["images"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["std"]),
            helper.make_node("MatMul", ["std", "weight"], ["logits"]),
        ],
        "mine",
        [helper.make_tensor_value_info("images", dtype, [batch, 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(matrix, "weight")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def made(path: Path, classes: int = 2) -> Stage:
    return stage(path, RECIPE, 8, classes)


def test_normalises_and_keeps_the_numbers(tmp_path: Path) -> None:
    wrapped = made(write(tmp_path / "mine.onnx"))
    trace(wrapped, tmp_path / "classify.onnx")
    checker.check_model(str(tmp_path / "classify.onnx"))
    session = ort.InferenceSession(str(tmp_path / "classify.onnx"))
    images = torch.rand(5, 3, 8, 8)
    (found,) = session.run(["logits"], {"images": images.numpy()})
    colours = (images.mean(dim=(2, 3)) - torch.tensor(RECIPE.mean)) / torch.tensor(RECIPE.std)
    expected = colours @ (torch.arange(6.0).view(3, 2) - 2)
    assert np.allclose(found, expected, atol=1e-5)
    twin = wrapped.twin(images)
    assert isinstance(twin, torch.Tensor)
    assert np.allclose(twin, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 1}, "has a fixed batch of 1: export it with a dynamic batch axis"),
        ({"size": 16}, r"has shape \[None, 3, 16, 16\], expected \[None, 3, 8, 8\]"),
        ({"classes": 4}, r"output 'logits' has shape \[None, 4\], expected \[None, 2\]"),
        ({"dtype": TensorProto.DOUBLE}, "not float32"),
    ],
)
def test_refusals_name_the_file_and_the_reason(change: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.onnx"
    try:
        write(path, **change)  # type: ignore[arg-type]
    except checker.ValidationError:
        pytest.fail("the test's own graph is wrong")
    with pytest.raises(ClassifierError, match=words) as caught:
        made(path)
    assert str(caught.value).startswith(str(path))


def test_not_onnx_at_all(tmp_path: Path) -> None:
    path = tmp_path / "mine.onnx"
    path.write_bytes(b"hello")
    with pytest.raises(ClassifierError, match="not a valid ONNX file"):
        made(path)
