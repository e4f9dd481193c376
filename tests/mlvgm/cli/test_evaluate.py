"""The verb as a user calls it, for each kind of classifier, on a small NVAE in the published format."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

import export.models
from evaluation.attacks import to_float
from evaluation.defences import Subject, defences
from export.classifier import stage
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline
from mlvgm.cli.main import main
from mlvgm.recipe import Recipe
from tests import bundles
from tests.evaluation.models import of_bundle
from tests.mlvgm import small

pytest.importorskip("foolbox")

SIDE = 16
CLASSES = ["dark", "red", "green"]
QUICK = ["--limit", "6", "--few", "4", "--threads", "1", "--threat", "deepfool", "--threat", "white"]


def colours() -> nn.Module:
    """A classifier that somebody wrote: it gives probabilities, of what colour an image is."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3), nn.Softmax(1))
    with torch.no_grad():
        network[2].weight.copy_(torch.from_numpy(_weights().T))
        network[2].bias.zero_()
    return network


def _weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)


def _onnx(path: Path) -> Path:
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["x"], ["mean"], kernel_shape=[8, 8], strides=[8, 8]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["y"]),
        ],
        "mine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(_weights(), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture(scope="module", params=["onnx", "callable"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml, its bundle, and images/CLASS/IMAGE, labelled as the bundle itself reads them."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.save(small.nvae(), folder / "nvae.pt")
    _onnx(folder / "mine.onnx")
    classifiers: dict[str, dict[str, Any]] = {
        "onnx": {"architecture": "onnx", "file": "mine.onnx"},
        "callable": {"architecture": f"{__name__}:colours"},
    }
    recipe = {
        "name": "small",
        "family": "nvae",
        "image_size": SIDE,
        "n_latents": 3,
        "classes": CLASSES,
        "classifier": classifiers[request.param],
        "purifier": "nvae.pt",
        "schedule": "none",
        "alphas": {"none": [0.0, 0.0, 0.0], "all": [1.0, 1.0, 1.0]},
        "samples": {"default": 2, "max": 4},
        "batch": {"min": 1, "opt": 2, "max": 8},
        "runtime": "onnxruntime",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["export", "--recipe", str(folder / "recipe.yaml"), "--out", str(folder / "bundle")]) == 0
    images = (small.images("photographs", 6, SIDE) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    with Pipeline.load(folder / "bundle", threads=1) as pipeline:
        labels = pipeline.run(images).labels
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / "images" / (CLASSES[label] if i % 2 else str(label))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def _evaluate(made: Path, out: Path, *words: object, bundle: Path | None = None) -> int:
    given = ["--images", made / "images", "--recipe", made / "recipe.yaml", "--json", out / "report.json"]
    given += ["--cache", out / "cache"]
    return main(["evaluate", str(bundle or made / "bundle"), *map(str, (*given, *QUICK, *words))])


def test_any_classifier_is_evaluated_and_work_goes_on(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--defence", "none", "--defence", "served", "--l2", "0.3"]
    assert _evaluate(made, tmp_path, *words) == 0
    page, content = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    assert content["accuracy"]["served"]["clean"]["count"] == 6
    assert {row: entry["n"] for row, entry in content["worst"].items()} == {"none": 4, "served": 4}
    assert content["engine_agrees"] == 1.0
    assert content["conclusion"] in page
    assert (tmp_path / "report.png").stat().st_size > 1000
    assert (tmp_path / "report.md").read_text() in page
    lines = (tmp_path / "report.jsonl").read_bytes().split()
    assert _evaluate(made, tmp_path, *words) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["accuracy"] == content["accuracy"]
    assert (tmp_path / "report.jsonl").read_bytes().split() == lines


def _forgetful(bundle: Path) -> None:
    """Everything of its images is drawn afresh: the alphas are 1."""
    dataclasses.replace(Manifest.read(bundle), alphas={"none": (1.0, 1.0)}).write(bundle)


def _coarse(bundle: Path) -> None:
    """The weights of its classifier are 8-bit integers, with a scale that leaves them three values."""
    manifest, file = Manifest.read(bundle), bundle / "classify.onnx"
    model = onnx.load(file)
    (weights,) = (tensor for tensor in model.graph.initializer if tensor.name == "w")
    values = numpy_helper.to_array(weights)
    scale = np.abs(values).max()
    model.graph.initializer.remove(weights)
    integers = (values / scale).round().astype(np.int8)
    model.graph.initializer.extend([numpy_helper.from_array(integers, "int8"), numpy_helper.from_array(scale, "scale")])
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["int8", "scale"], ["w"]))
    onnx.save(model, file)
    (bundle / "classify.onnx.data").unlink()
    manifest.write(bundle)


@pytest.mark.parametrize("worsen", [_forgetful, _coarse])
def test_a_worse_bundle_is_refused_by_the_gate(
    worsen: Callable[[Path], None],
    nvae_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classifier = of_bundle(nvae_bundle)
    monkeypatch.setattr(export.models, "load_models", lambda *_: (classifier, classifier))
    good, manifest = tmp_path / "good", Manifest.read(nvae_bundle)
    shutil.copytree(nvae_bundle, good)
    dataclasses.replace(manifest, default_alphas="none").write(good)
    worse = tmp_path / "worse"
    shutil.copytree(good, worse)
    worsen(worse)
    with Pipeline.load(good, "onnxruntime") as pipeline:
        np.savez(tmp_path / "set.npz", images=bundles.images(40), labels=pipeline.run(bundles.images(40)).labels)
    recipe = {"name": "tiny", "family": "nvae", "image_size": 8, "n_latents": 2, "classes": 3}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**recipe, "classifier": {"architecture": "vgg11"}}))
    (tmp_path / "gate.yaml").write_text("clean: 0.95\nattacked: {noise: 0.01}\n")
    words = ["--images", tmp_path / "set.npz", "--recipe", tmp_path / "tiny.yaml", "--gate", tmp_path / "gate.yaml"]
    words += [
        "--threat",
        "noise",
        "--defence",
        "served",
        "--json",
        tmp_path / "report.json",
        "--runtime",
        "onnxruntime",
    ]

    def evaluate(bundle: Path) -> tuple[int, list[str]]:
        code = main(["evaluate", str(bundle), *map(str, words)])
        return code, [line for line in capsys.readouterr().err.splitlines() if "refused by" in line]

    assert evaluate(good) == (0, [])
    code, refusals = evaluate(worse)
    assert code == 1
    assert len(refusals) == 1
    assert f"refused by {tmp_path / 'gate.yaml'}: clean: " in refusals[0]


@pytest.mark.parametrize("made", ["callable"], indirect=True)
def test_the_worst_alone_takes_costly_attacks_to_all_images(made: Path, tmp_path: Path) -> None:
    given = ["--images", made / "images", "--recipe", made / "recipe.yaml", "--json", tmp_path / "report.json"]
    words = [
        "--worst",
        "--bf16",
        "--limit",
        6,
        "--threat",
        "apgd",
        "--threat",
        "white",
        "--defence",
        "none",
        "--defence",
        "served",
    ]
    words += ["--l2", 2, "--steps", 3, "--restarts", 2, "--draws", 1, "--threads", 1, "--cache", tmp_path / "cache"]
    assert main(["evaluate", str(made / "bundle"), *map(str, (*given, *words))]) == 0
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["budget"]["effort"] == {"steps": 3, "restarts": 2, "draws": 1, "bf16": True}
    for row in ("none", "served"):
        accuracy = content["accuracy"][row]
        assert accuracy["white"] == content["worst"][row]
        assert accuracy["white"]["n"] == 6
        assert content["skipped"][row]["white"] == 6 - accuracy["apgd"]["count"]


@pytest.mark.parametrize("name", ["report.jsonl", "report.md"])
def test_no_report_takes_the_name_of_its_log_or_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "bundle", "--images", "images", "--json", name]) != 0
    assert "name it report.json" in capsys.readouterr().err


@pytest.mark.parametrize("made", ["callable"], indirect=True)
def test_the_noise_of_a_seed_is_that_of_the_engines(made: Path) -> None:
    recipe = Recipe.read(str(made / "recipe.yaml"))
    purifier, classifier = export.models.load_models(recipe, None, None)
    adapted = stage(classifier, SIDE, 3).reference
    images = (small.images("photographs", 3, SIDE) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    with Pipeline.load(made / "bundle", threads=1) as pipeline:
        row = defences(Subject(pipeline, purifier, adapted), 4, "all")["served"]  # type: ignore[arg-type]
        served = row.serve(images, [3, 1, 4]).logits
        assert row.seeded is not None
        same, other = (row.seeded(to_float(images), 4, seeds).logits.mean(dim=0) for seeds in ([3, 1, 4], [3, 1, 5]))
    assert np.abs(same.detach().numpy() - served).max() < 1e-3
    assert np.abs(other.detach().numpy() - served)[:2].max() < 1e-3
    assert np.abs(other.detach().numpy() - served)[2].max() > 1e-3


@pytest.mark.parametrize("made", ["callable"], indirect=True)
def test_strict_refuses_a_report_with_caveats(made: Path, tmp_path: Path) -> None:
    words = ["--defence", "none", "--threat", "noise"]
    assert _evaluate(made, tmp_path, *words) == 0
    assert _evaluate(made, tmp_path, *words, "--strict") == 1  # six images are few


@pytest.mark.parametrize("made", ["callable"], indirect=True)
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--defence", "magic"], "no defence 'magic': there are none, blur"),
        (["--alphas", "cosin"], "no schedule 'cosin'"),
        (["--samples", "1000"], "samples must be 1 to 4"),
        (["--comparators", "nowhere"], "nowhere: holds no comparator"),
        (["--images", "nowhere"], "nowhere"),
        (["--gate", "nowhere.yaml"], "nowhere.yaml"),
        pytest.param(
            ["--device", "cuda"],
            "PyTorch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    made: Path, tmp_path: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate(made, tmp_path, *words) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
