"""A user's ONNX classifier goes in as it is, is adapted in its graph, or is refused with the reason."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, checker, helper, load, numpy_helper, save

from export.classifier import stage
from export.onnx_classifier import OnnxClassifier
from export.probe import ClassifierError
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


def made(path: Path, recipe: ClassifierRecipe = RECIPE, classes: int = 2) -> Stage:
    return stage(OnnxClassifier(path, recipe, 8, classes), 8, classes)


def outputs(wrapped: Stage, folder: Path, images: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Of the graph that is written, and of the reference."""
    trace(wrapped, folder / "classify.onnx")
    checker.check_model(str(folder / "classify.onnx"))
    session = ort.InferenceSession(str(folder / "classify.onnx"))
    (found,) = session.run(["logits"], {"images": images.numpy()})
    reference = wrapped.reference(images)
    assert isinstance(reference, torch.Tensor)
    return found, reference


def of_colours(colours: torch.Tensor) -> torch.Tensor:
    """What the file of `write` makes of mean colours (B, 3)."""
    return colours @ (torch.arange(6.0).view(3, 2) - 2)


def test_normalises_and_keeps_the_numbers(tmp_path: Path) -> None:
    images = torch.rand(5, 3, 8, 8)
    found, reference = outputs(made(write(tmp_path / "mine.onnx")), tmp_path, images)
    expected = of_colours((images.mean(dim=(2, 3)) - torch.tensor(RECIPE.mean)) / torch.tensor(RECIPE.std))
    assert np.allclose(found, expected, atol=1e-5)
    assert np.allclose(reference, expected, atol=1e-5)


@pytest.mark.parametrize("change", [{"size": 16}, {"size": 4}, {"batch": 1}, {"batch": 2}])
def test_what_it_takes_otherwise_is_adapted(change: dict[str, object], tmp_path: Path) -> None:
    path, said = write(tmp_path / "mine.onnx", **change), []  # type: ignore[arg-type]
    images = torch.rand(5, 3, 8, 8)
    wrapped = stage(OnnxClassifier(path, RECIPE, 8, 2), 8, 2, said.append)
    found, reference = outputs(wrapped, tmp_path, images)
    # The mean over all pixels is what the file sees, and resampling by a whole factor keeps it, but for the borders.
    expected = of_colours((images.mean(dim=(2, 3)) - torch.tensor(RECIPE.mean)) / torch.tensor(RECIPE.std))
    assert np.allclose(found, expected, atol=0.5 if "size" in change else 1e-5)
    assert np.allclose(found, reference, atol=1e-5)
    assert len(said) == 1
    assert said[0].startswith("the classifier is adapted: it takes ")


def of_cosines(path: Path) -> Path:
    """The file of `write` with another operator at its end, for which there is no derivative."""
    model = load(write(path))
    del model.graph.output[:]
    model.graph.node.extend([helper.make_node("Cos", ["logits"], ["cosines"])])
    model.graph.output.append(helper.make_tensor_value_info("cosines", TensorProto.FLOAT, ["N", 2]))
    save(model, path)
    return path


def test_gradients_are_those_of_the_operators(tmp_path: Path) -> None:
    classifier = OnnxClassifier(write(tmp_path / "mine.onnx", size=16), RECIPE, 8, 2)
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    classifier(images)[:, 1].sum().backward()
    by_colour = torch.tensor([-1.0, 1.0, 3.0]) / torch.tensor(RECIPE.std)  # the matrix' second column, over std
    assert images.grad is not None
    assert torch.allclose(images.grad.sum(dim=(2, 3)), by_colour.expand(2, -1), rtol=1e-4)


def test_gradients_are_estimated_where_an_operator_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classifier = OnnxClassifier(of_cosines(tmp_path / "mine.onnx"), RECIPE, 8, 2)
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    classifier(images)[:, 1].sum().backward()
    assert images.grad is not None
    inner = of_colours((images.detach().mean(dim=(2, 3)) - torch.tensor(RECIPE.mean)) / torch.tensor(RECIPE.std))[:, 1]
    by_colour = torch.tensor([-1.0, 1.0, 3.0]) / torch.tensor(RECIPE.std) / 64
    expected = (-torch.sin(inner)[:, None] * by_colour)[:, :, None, None].expand(2, 3, 8, 8)
    assert torch.cosine_similarity(images.grad.flatten(), expected.flatten(), dim=0) > 0.3
    assert "gradients are estimated" in caplog.text
    assert "Cos" in caplog.text


def test_bytes_are_rounded_pixels(tmp_path: Path) -> None:
    cast = helper.make_node("Cast", ["x"], ["images"], to=TensorProto.FLOAT)
    model = load(write(tmp_path / "mine.onnx"))
    model.graph.node.insert(0, cast)
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.UINT8, ["N", 3, 8, 8]))
    save(model, tmp_path / "bytes.onnx")
    images = torch.rand(5, 3, 8, 8) * 1.2 - 0.1  # a generator may overshoot
    found, reference = outputs(made(tmp_path / "bytes.onnx", ClassifierRecipe("onnx")), tmp_path, images)
    expected = of_colours((images.clamp(0, 1) * 255).round().mean(dim=(2, 3)))
    assert np.allclose(found, expected, rtol=1e-3)
    assert np.allclose(found, reference, rtol=1e-5)


def test_weights_of_any_size_are_copied_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    file = write(tmp_path / "mine.onnx", classes=100)
    save(load(file), tmp_path / "own/mine.onnx", save_as_external_data=True, size_threshold=0)
    monkeypatch.setattr("export.onnx_graph.INLINE_BYTES", 1)
    classifier = OnnxClassifier(tmp_path / "own/mine.onnx", RECIPE, 8, 100)
    assert isinstance(classifier.graph().graph.initializers["weight"].const_value, ir.ExternalTensor)
    found, reference = outputs(stage(classifier, 8, 100), tmp_path, torch.rand(2, 3, 8, 8))
    assert np.allclose(found, reference, atol=1e-4)
    assert (tmp_path / "classify.onnx.data").stat().st_size == 3 * 100 * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": 4}, r"output 'logits' has shape \[None, 4\], not \[None, 2\] for the recipe's 2 classes"),
        ({"dtype": TensorProto.INT64}, "its input 'images' is int64"),
    ],
)
def test_refusals_name_the_file_and_the_reason(change: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.onnx"
    write(path, **change)  # type: ignore[arg-type]
    with pytest.raises(ClassifierError, match=words) as caught:
        made(path)
    assert str(caught.value).startswith(str(path))


def test_not_onnx_at_all(tmp_path: Path) -> None:
    path = tmp_path / "mine.onnx"
    path.write_bytes(b"hello")
    with pytest.raises(ClassifierError, match="not a valid ONNX file"):
        made(path)
