"""Bulk purification: every good file is written, a bad one is named, and cut-off work goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handlers.pipeline import Pipeline
from mlvgm.cli.main import main
from tests.bundles import write_nvae


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_nvae(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    folder = tmp_path / "signs"
    (folder / "deeper").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "deeper/a.bmp", "c.webp", "d.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_every_image_is_purified(bundle: Path, signs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["purify", str(signs), "--bundle", str(bundle), "--out", str(out), "--samples", "2", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with Pipeline.load(bundle) as pipeline:
        size, classes = pipeline.manifest.image_size, pipeline.manifest.classes
    assert {Path(answer["purified"]).relative_to(out).as_posix() for answer in answers} == {
        "a.png", "b.png", "deeper/a.png", "c.png", "d.png",
    }  # fmt: skip
    for answer in answers:
        assert Image.open(answer["purified"]).size == size[::-1]
        assert answer["label"] in classes
        assert answer["agreement"] in (0.5, 1.0)
    assert not list(out.rglob("*.part"))


def test_a_bad_file_is_named_and_the_rest_goes_on(
    bundle: Path, signs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (signs / "b.jpg").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert main(["purify", str(signs), "--bundle", str(bundle), "--out", str(out)]) == 1
    assert "b.jpg: " in capsys.readouterr().err
    assert len(list(out.rglob("*.png"))) == 4


def test_what_is_there_is_left_unless_told(
    bundle: Path, signs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_bytes(b"mine")
    words = ["purify", str(signs), "--bundle", str(bundle), "--out", str(out)]
    assert main(words) == 0
    assert (out / "a.png").read_bytes() == b"mine"
    assert "1 of 5 images are there already" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert (out / "a.png").read_bytes().startswith(b"\x89PNG")


def test_originals_are_never_overwritten(
    bundle: Path, signs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["purify", str(signs), "--bundle", str(bundle), "--out", str(signs)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
