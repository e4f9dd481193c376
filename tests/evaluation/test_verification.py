"""Verification passes what was exported rightly, finds what was not, and says by how much."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import export.models
from evaluation.verification import VerificationError, difference, verify
from export.bundle import export_bundle
from handlers import runtimes
from mlvgm.cli.main import main
from mlvgm.nvae import NVAE, NVAEConfig, NVAEPurifier
from mlvgm.recipe import Recipe
from tests.export import models


@pytest.fixture(scope="module", params=[(False, 0.0), (True, 0.5)], ids=["plain", "blur and noise"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "tiny"
    export_bundle(models.recipe(*request.param), models.purifier(), models.classifier(), out)
    return out


def pictures(count: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


def test_difference_is_what_it_says() -> None:
    found, expected = np.array([1.0, 2.0, 2.0, 5.0]), np.array([1.0, 2.0, 2.0, 4.0])
    gap = difference(found, expected)
    assert gap.relative_l2 == pytest.approx(1 / 5)
    assert (gap.max, gap.mean, gap.median) == (1.0, 0.25, 0.0)
    assert gap.cosine == pytest.approx(29 / (5 * np.sqrt(34)))
    assert gap.psnr == pytest.approx(10 * np.log10(16 / 0.25))
    assert difference(expected, expected).psnr == float("inf")
    assert difference(np.array([np.nan, 1.0]), np.array([1.0, 1.0])).relative_l2 == float("inf")


def test_every_stage_and_the_whole_agree_in_every_runtime(bundle: Path) -> None:
    names = runtimes.available()
    rows = verify(bundle, models.purifier(), models.classifier(), {"clean": pictures(3)}, names)
    assert {row["runtime"] for row in rows} == set(names)
    assert {row["stage"] for row in rows} == {"encode", "decode", "classify", "end to end"}
    assert max(row["relative_l2"] for row in rows) < 1e-4
    whole = [row for row in rows if row["stage"] == "end to end"]
    assert all(row["equal_labels"] == row["equal_votes"] == 1.0 for row in whole)


def test_another_classifier_is_found_in_its_own_stage(bundle: Path) -> None:
    other = models.classifier()
    with torch.no_grad():
        list(other.parameters())[-1].add_(0.1)  # the bias of the last layer
    rows = verify(bundle, models.purifier(), other, {"clean": pictures(2)}, ["onnxruntime"])
    assert {row["stage"] for row in rows if row["relative_l2"] > 1e-4} == {"classify"}
    assert next(row for row in rows if row["stage"] == "end to end")["logits_relative_l2"] > 1e-4


def test_another_model_is_refused(bundle: Path) -> None:
    config = NVAEConfig(**{**models.CONFIG.__dict__, "latent_channels": 3})
    other = models.unsettle(NVAEPurifier(NVAE(config)))
    assert isinstance(other, NVAEPurifier)
    with pytest.raises(VerificationError, match="different models"):
        verify(bundle, other, models.classifier(), {"clean": pictures(1)}, ["onnxruntime"])


@pytest.mark.parametrize(("limit", "code"), [("1e-4", 0), ("1e-12", 1)])
def test_the_verb_writes_a_report_and_tells_by_its_exit_code(
    bundle: Path, limit: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recipe, "read", lambda _name: models.recipe())
    monkeypatch.setattr(export.models, "load_models", lambda *_: (models.purifier(), models.classifier()))
    words = ["verify", str(bundle), "--count", "2", "--runtime", "onnxruntime", "--limit", limit, "--no-attack"]
    assert main([*words, "--json", str(tmp_path / "report" / "verify.json")]) == code
    content = json.loads((tmp_path / "report" / "verify.json").read_text())
    assert content["passed"] is (code == 0)
    assert content["rows"]
    assert (tmp_path / "report" / "verify.md").read_text().count("end to end") == 1
    assert (tmp_path / "report" / "verify.png").stat().st_size > 1000
