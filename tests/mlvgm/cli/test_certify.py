"""Certified answers on the command line: one JSON object an image, whatever becomes of the others."""

import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from PIL import Image

from handlers.binomial import lower_bound
from mlvgm.cli.main import main
from tests import bundles


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Its answer is class 0 for bright images, class 1 for dark ones."""
    weights = np.zeros((3 * bundles.SIZE**2, 3), np.float32)
    weights[:, 0], weights[:, 1] = 1, -1
    bundles.write_plain(tmp_path / "bundle", weights)
    return tmp_path / "bundle"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "deeper").mkdir(parents=True)
    for name, gray in (("a.png", 250), ("deeper/b.png", 5), ("c.png", 128)):
        Image.new("RGB", (bundles.SIZE,) * 2, (gray,) * 3).save(tmp_path / "images" / name)
    return tmp_path / "images"


def rows(text: str) -> dict[str, dict[str, object]]:
    return {Path(row["file"]).name: row for row in map(json.loads, text.splitlines())}


def test_a_folder_is_certified(bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "d.png").write_bytes(b"no picture")
    code = main(["certify", str(folder), "--bundle", str(bundle), "--draws", "100", "--sigma", "0.1"])
    found = rows(capsys.readouterr().out)
    assert code == 1
    assert "not a JPEG" in str(found.pop("d.png")["error"])
    assert {name: row["certified_label"] for name, row in found.items() if name != "c.png"} == {
        "a.png": bundles.CLASSES[0],
        "b.png": bundles.CLASSES[1],
    }
    most = 0.1 * NormalDist().inv_cdf(lower_bound(100, 100, 0.001))
    for name in ("a.png", "b.png"):
        assert found[name]["certified_l2"] == pytest.approx(most, abs=1e-6)
        assert found[name]["certified_l2"] <= most, "rounded down"
    for row in found.values():
        assert {"file", "certified_index", "abstained", "sigma", "alpha", "draws"} < set(row)
        assert (row["sigma"], row["alpha"], row["draws"]) == (0.1, 0.001, 100)
        assert row["abstained"] == (row["certified_label"] is None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--sigma", "0"], "sigma must be more than 0"),
        (["--draws", "0"], "draws must be 1 or more"),
        (["--alpha", "1"], "alpha must lie between"),
        (["--alphas", "nosuch"], "alphas must be one of"),
    ],
)
def test_wrong_options_end_in_a_line(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert main(["certify", str(folder), "--bundle", str(bundle), *options]) == 2
    found = capsys.readouterr()
    assert reason in found.err
    assert not found.out


def test_no_image_is_an_error(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["certify", str(tmp_path / "empty"), "--bundle", str(bundle)]) == 2
    assert "no image" in capsys.readouterr().err
