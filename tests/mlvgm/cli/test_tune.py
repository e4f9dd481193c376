import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from evaluation import tuning
from export import models
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline
from mlvgm.cli.main import main
from tests import bundles
from tests.evaluation.models import of_bundle, pictures
from tests.evaluation.test_learning import Halves

pytest.importorskip("foolbox")


@pytest.fixture
def words(tmp_path: Path, nvae_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a tiny bundle and photographs in folders."""
    monkeypatch.setattr(models, "recipe_classifier", lambda _recipe, _file: of_bundle(nvae_bundle))
    monkeypatch.chdir(tmp_path)
    for i, pixels in enumerate(pictures(9)):
        path = tmp_path / "data" / "validation" / str(i % 3) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    manifest = Manifest.read(nvae_bundle)
    recipe = {
        "name": manifest.name,
        "family": "nvae",
        "image_size": manifest.image_size[0],
        "n_latents": manifest.n_latents,
        "classes": list(manifest.classes),
        "classifier": {"architecture": "vgg11"},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    data = ["--bundle", str(nvae_bundle), "--data", str(tmp_path / "data"), "--recipe", "tiny.yaml"]
    return ["tune", *data, "--attacks", "deepfool", "--out", "tuned.json"]


def test_finds_and_writes_weights(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--images", "5", "--check", "4", "--trials", "26", "--finalists", "2", "--samples", "2"]) == 0
    content = json.loads(Path("tuned.json").read_text())
    assert len(content["trials"]) <= 26
    assert len(content["finalists"]) == 2
    assert content["finalists"][0]["score"] >= content["finalists"][1]["score"]
    assert content["as_it_is"]["alphas"] == [0.5, 1.0]
    assert capsys.readouterr().err.count("score ") == len(content["trials"])


def test_alphas_by_gradient_are_compared_with_those_of_the_search(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, nvae_bundle: Path
) -> None:
    monkeypatch.setattr(models, "load_models", lambda *_: (Halves(), of_bundle(nvae_bundle)))
    assert main([*words, "--images", "5", "--check", "4", "--trials", "3", "--steps", "2", "--method", "both"]) == 0
    content = json.loads(Path("tuned.json").read_text())
    kinds = [trial["origin"].startswith("gradient from ") for trial in content["trials"]]
    assert kinds.count(True) == 4
    assert kinds.count(False) == 3
    assert {trial["origin"].startswith("gradient from ") for trial in content["finalists"]} == {True, False}
    out = capsys.readouterr().out
    assert "against" in out
    assert out.count("no difference") == 2  # of the two methods, and from the bundle's own
    assert main([*words, "--images", "5", "--check", "4", "--steps", "1", "--method", "gradient"]) == 0
    assert len(json.loads(Path("tuned.json").read_text())["trials"]) == 4


def test_says_that_there_is_no_difference(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Four images to compare on cannot show one."""
    assert main([*words, "--images", "5", "--check", "4", "--trials", "3"]) == 0
    content = json.loads(Path("tuned.json").read_text())
    assert content["alphas"] == [0.5, 1.0]
    assert not content["gain"]["is_certain"]
    out = capsys.readouterr().out
    assert "no difference" in out
    assert "tuned:" not in out


def test_prints_weights_that_are_better(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "gain", lambda *_: tuning.Gain(0.1, 0.05, 0.15))
    assert main([*words, "--images", "5", "--check", "4", "--trials", "3"]) == 0
    content = json.loads(Path("tuned.json").read_text())
    assert content["alphas"] == content["finalists"][0]["alphas"]
    out = capsys.readouterr().out
    assert "better than the bundle's own weights by +0.1000 (+0.0500 to +0.1500)" in out
    assert f"tuned: [{', '.join(f'{a:g}' for a in content['alphas'])}]" in out


def test_refuses_what_cannot_work(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--images", "9"]) == 2
    assert "9 validation images, too few" in capsys.readouterr().err
    assert main([*words, "--images", "5", "--samples", "1000"]) == 2
    says = capsys.readouterr().err
    assert "samples must be 1 to" in says
    assert says.count("\n") == 1, "it has not begun to attack"
    with pytest.raises(SystemExit):
        main([*words, "--trials", "0"])
    assert "--trials: must be a whole number from 1" in capsys.readouterr().err


def test_sets_the_threshold_of_the_attack_score(
    nvae_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(nvae_bundle, tmp_path / "bundle"))
    images = bundles.images(40)
    (tmp_path / "data" / "validation" / "0").mkdir(parents=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / "data" / "validation" / "0" / f"{i:02}.png")
    words = ["tune", "--bundle", str(bundle), "--data", str(tmp_path / "data"), "--score"]
    assert main([*words, "0.1"]) == 0
    assert "are; of further ones" in capsys.readouterr().out
    with Pipeline.load(bundle) as pipeline:
        threshold = pipeline.manifest.score
        assert threshold is not None
        assert threshold.false_alarms == 0.1
        assert (pipeline.run(images).scores > threshold.threshold).mean() < 0.3
    assert main([*words, "0.01"]) == 2
    assert "needs 99 clean images, not 40" in capsys.readouterr().err
    assert Manifest.read(bundle).score == threshold
