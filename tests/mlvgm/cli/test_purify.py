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
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".mlvgm-lock"]


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
    assert main(words) == 1
    assert (out / "a.png").read_bytes() == b"mine"
    captured = capsys.readouterr()
    assert "1 of 5 images are there already" in captured.err
    assert f"{signs / 'a.png'}: {out / 'a.png'} is there and not made from it" in captured.err
    assert len(captured.out.splitlines()) == 4
    assert main([*words, "--overwrite"]) == 0
    assert (out / "a.png").read_bytes().startswith(b"\x89PNG")


def test_all_answers_come_again_without_the_engines(
    bundle: Path, signs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["purify", str(signs), "--bundle", str(bundle), "--out", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(Pipeline, "load", lambda *_: pytest.fail("there is nothing to purify"))
    assert main(words) == 0
    assert capsys.readouterr().out == first
    for other in (["--samples", "3"], ["--samples", "auto"], ["--alphas", "none"]):
        assert main([*words, *other]) == 2
        assert "made with other settings" in capsys.readouterr().err


def test_an_image_that_overflows_is_named(
    nvae_bundle: Path, signs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8), "white").save(signs / "b.jpg")
    assert main(["purify", str(signs), "--bundle", str(nvae_bundle), "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert f"{signs / 'b.jpg'}: stage encode overflowed on this image" in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.out.splitlines()) == 4


def test_or_purified_in_fp32(half_bundle: Path, signs: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "white").save(signs / "b.jpg")
    words = ["purify", str(signs), "--bundle", str(half_bundle), "--out", str(tmp_path / "out")]
    assert main([*words, "--runtime", "onnxruntime"]) == 0


@pytest.mark.parametrize(("option", "value"), [("--samples", "1000"), ("--alphas", "no such")])
def test_refuses_what_the_server_would_refuse(
    option: str, value: str, bundle: Path, signs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["purify", str(signs), "--bundle", str(bundle), "--out", str(tmp_path / "out"), option, value]) == 2
    assert option[2:] in capsys.readouterr().err


def test_originals_are_never_overwritten(
    bundle: Path, signs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["purify", str(signs), "--bundle", str(bundle), "--out", str(signs)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
