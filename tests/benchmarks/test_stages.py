"""The stages benchmark: its report, the errors it must notice, and the random weights it offers."""

import contextlib
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks import stages, synthetic
from deploy.errors import CliError
from evaluation import report
from export.bundle import export_bundle
from export.models import load_models
from mlvgm.cli.main import main
from mlvgm.load import load_classifier, load_purifier
from mlvgm.nvae import NVAE
from mlvgm.recipe import Recipe
from tests.mlvgm import small

FIELDS = {
    "recipe", "technique", "runtime", "precision", "batch", "samples", "images_per_s", "ratio", "stage_ms",
    "memory_mb", "gflops", "share_of_peak", "relative_error", "label_agreement",
    "compared",
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a small NVAE and a small ResNet, with their checkpoints beside it."""
    folder = tmp_path_factory.mktemp("recipe")
    torch.save(small.nvae(), folder / "purifier.pt")
    torch.save(small.resnet(), folder / "classifier.pt")
    content = {
        "name": "tiny", "family": "nvae", "image_size": 16, "n_latents": 3, "classes": 3,
        "batch": {"min": 1, "opt": 2, "max": 4},
        "classifier": {"architecture": "resnet50"},
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return folder / "tiny.yaml"


def test_report_has_every_technique_and_agrees(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--recipe", str(recipe), "--purifier", str(recipe.parent / "purifier.pt")]
    words += ["--classifier", str(recipe.parent / "classifier.pt"), "--batch", "1", "3", "--samples", "1", "2"]
    file = tmp_path / "stages.json"
    assert main(["bench", "stages", *words, "--compare", "6", "--seconds", "0.01", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    rows = content["rows"]
    assert all(set(row) == FIELDS for row in rows)
    assert {(row["technique"], row["runtime"], row["precision"]) for row in rows} == {
        (technique.name, technique.runtime, technique.precision) for technique in stages.techniques()
    }
    assert {(row["batch"], row["samples"]) for row in rows} == {(1, 1), (3, 1), (1, 2), (3, 2)}
    exact = [row for row in rows if row["precision"] == "fp32"]
    assert max(row["relative_error"] for row in exact) < 1e-4
    assert min(row["label_agreement"] for row in exact) == 1.0
    assert [row["ratio"] for row in rows[:4]] == [1.0] * 4
    assert all(row["share_of_peak"] > 0 and row["gflops"] > 0 for row in rows)
    assert "published operators" in file.with_suffix(".md").read_text()
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_another_model_is_noticed(recipe: Path, tmp_path: Path) -> None:
    classifier = recipe.parent / "classifier.pt"
    models = load_models(Recipe.read(recipe), recipe.parent / "purifier.pt", classifier)
    export_bundle(Recipe.read(recipe), *models, tmp_path / "bundle")
    torch.manual_seed(1)
    other = tmp_path / "other.pt"
    torch.save(synthetic.nvae(small.CONFIG) | {"state_dict_temp=0.6": _halved(small.nvae())}, other)
    model = stages.ModelUnderTest(str(recipe), tmp_path / "bundle", other, classifier)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    chosen = [stages.Technique(stages.PUBLISHED, "eager"), stages.Technique(stages.EXPORTED, "onnxruntime")]
    rows = stages.measure(model, images, [stages.Load(2, 1, 2)], 0, chosen=chosen)
    assert rows[1]["relative_error"] > 1e-3


def test_what_the_system_kills_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_run", _killed_unless_published)
    published, rewritten = (stages.Technique(name, "eager") for name in (stages.PUBLISHED, stages.REWRITTEN))
    model, images, said = stages.ModelUnderTest("tiny", tmp_path), np.zeros((1, 2, 2, 3), np.uint8), list[str]()
    loads = [stages.Load(1, 1, 1)]
    rows = stages.measure(model, images, loads, chosen=[published, rewritten], say=said.append)
    assert [row["technique"] for row in rows] == [stages.PUBLISHED]
    assert any("not measured: its process was ended by the system" in line for line in said)
    with pytest.raises(CliError, match="nothing to compare with"):
        stages.measure(model, images, loads, chosen=[rewritten])


def _killed_unless_published(_: object, technique: stages.Technique, *__: object) -> tuple[float, list]:
    """In a process of its own, which this module is imported in."""
    if technique.name != stages.PUBLISHED:
        os.kill(os.getpid(), signal.SIGKILL)
    pixels, labels = np.zeros((1, 3, 2, 2), np.float32), np.zeros(1, np.int64)
    return 1.0, [stages.Measured(1.0, {}, 1.0, 1.0, pixels, labels)]


@pytest.mark.parametrize(
    ("name", "latents", "side"), [("celeba-gender", 18, 256), ("stanford-cars", 16, 128)], ids=["e4e", "transformer"]
)
def test_synthetic_weights_have_the_published_sizes(
    name: str, latents: int, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "draw", lambda _, shape: torch.zeros(shape))  # sizes alone: drawing takes long
    recipe = Recipe.read(name)
    purifier, classifier = synthetic.write_checkpoints(recipe, tmp_path)
    loaded = load_purifier(recipe.family, purifier)
    assert (loaded.n_latents, loaded.image_size) == (latents, side)
    assert load_classifier(recipe.classifier.architecture, classifier, len(recipe.classes))


def test_published_nvae_has_its_parameters() -> None:
    with torch.device("meta"):
        network = NVAE(synthetic.CELEBA_64)
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == 706_658_160
    assert len(network.state_dict()) == 2700


def test_reports_are_strict_json(tmp_path: Path) -> None:
    report.save({"rows": [{"psnr": math.inf, "x": math.nan, "y": 1.5}]}, "", tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"rows": [{"psnr": None, "x": None, "y": 1.5}]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "must be a whole number from 1"),
        (["--recipe", "a", "--recipe", "b", "--purifier", "x.pt"], "give --recipe once"),
        (["--recipe", "celeba-gender"], "give its checkpoint with --purifier"),
    ],
)
def test_wrong_arguments_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["bench", "stages", *words]) == 2
    assert message in capsys.readouterr().err


def _halved(checkpoint: dict) -> dict:
    return {
        key: tensor / 2 if tensor.is_floating_point() and "running" not in key else tensor
        for key, tensor in checkpoint["state_dict_temp=0.6"].items()
    }
