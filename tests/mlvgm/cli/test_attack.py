import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import attacks
from evaluation.signs import drawn_signs
from export import models
from mlvgm.cli.main import main
from tests.evaluation.models import linear, of_bundle, pictures, shipped

pytest.importorskip("foolbox")

TINY = """
name: tiny
family: nvae
image_size: 8
n_latents: 2
classifier: {architecture: "vgg11"}
classes: [stop, yield, speed limit]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose classifier is linear."""
    monkeypatch.setattr(models, "recipe_classifier", lambda _recipe, _file: linear())
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path / "tiny.yaml"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, pixels in zip(paths, pictures(3), strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def _attack(recipe: Path, *words: object) -> int:
    return main(["attack", "--recipe", str(recipe), "--method", "deepfool", *map(str, words)])


def test_writes_images_that_fool(
    recipe: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _attack(recipe, *files, "--out", out, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3
    for row, file, before in zip(rows, files, pictures(3), strict=True):
        assert row["file"] == str(file)
        with Image.open(row["attacked"]) as picture:
            assert picture.mode == "RGB"
            after = np.asarray(picture)
        assert row["before"] != row["after"]
        assert row["fooled"]
        names = ("stop", "yield", "speed limit")
        assert names[attacks.predict(linear(), after[None])[0]] == row["after"]
        assert row["l2"] == pytest.approx(np.linalg.norm((after / 255 - before / 255).ravel()), abs=1e-4)


def test_prints_a_line_each_and_totals(
    recipe: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _attack(recipe, *files, "--out", tmp_path / "out") == 0
    *rows, totals = capsys.readouterr().out.splitlines()
    assert len(rows) == 3
    assert all(" -> " in row and "  L2 " in row for row in rows)
    assert totals.startswith("fooled 3 of 3 (44% to 100%), median L2 ")


def test_goes_on_where_it_was_cut_off(
    recipe: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert _attack(recipe, *files[:2], "--out", out, "--json") == 0
    first = capsys.readouterr().out
    attacked = []
    attack = attacks.attack
    monkeypatch.setattr(attacks, "attack", lambda *given: attacked.append(len(given[1])) or attack(*given))
    assert _attack(recipe, *files, "--out", out, "--json") == 0
    assert attacked == [1]
    assert capsys.readouterr().out.startswith(first)
    assert _attack(recipe, *files, "--out", out, "--method", "cw") == 2
    assert "other settings" in capsys.readouterr().err


def test_does_not_attack_what_it_has_written(recipe: Path, files: list[Path], tmp_path: Path) -> None:
    for _ in range(2):
        assert _attack(recipe, tmp_path, "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_a_folder_keeps_its_shape(recipe: Path, tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.bmp"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        Image.fromarray(pictures(1)[0]).save(tmp_path / "in" / name)
    assert _attack(recipe, tmp_path / "in", "--out", tmp_path / "out") == 0
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png")) == [
        "a/x.png",
        "b/x.png",
    ]


def test_purifies_with_a_bundle(
    recipe: Path, files: list[Path], nvae_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(models, "recipe_classifier", lambda _recipe, _file: of_bundle(nvae_bundle))
    sheet = tmp_path / "sheet.png"
    words = [*files, "--out", tmp_path / "out", "--bundle", nvae_bundle, "--samples", 3, "--picture", sheet, "--json"]
    assert _attack(recipe, *words) == 0
    captured = capsys.readouterr()
    row = json.loads(captured.out.splitlines()[0])
    assert "of these purified to what was read before" in captured.err
    with Image.open(sheet) as picture:
        assert picture.width > picture.height > 100
    assert row["purified"] in ("stop", "yield", "speed limit \N{DEGREE SIGN}")
    assert 0 < row["agreement"] <= 1


def test_a_bad_file_does_not_stop_the_others(
    recipe: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    words = [tmp_path / "bad.png", tmp_path / "absent.png", files[0], "--out", tmp_path / "out"]
    assert _attack(recipe, *words) == 1
    captured = capsys.readouterr()
    assert "bad.png: not a JPEG" in captured.err
    assert "absent.png: No such file" in captured.err
    assert (tmp_path / "out" / "0.png").exists()


def test_nothing_is_overwritten(
    recipe: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files[0].read_bytes()
    assert _attack(recipe, files[0], "--out", files[0].parent) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert files[0].read_bytes() == before
    assert _attack(recipe, files[0], files[0], "--out", tmp_path / "out") == 2
    assert "both become" in capsys.readouterr().err


def test_the_shipped_classifier_misreads_a_drawn_stop_sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped()
    (stop,) = (sign.image for sign in drawn_signs() if sign.name == "stop")
    Image.fromarray(stop).save(tmp_path / "stop.png")
    assert main(["attack", str(tmp_path / "stop.png"), "--out", str(tmp_path / "out"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["before"] == "stop" != row["after"]
    assert 0 < row["l2"] < 3
