import json
from pathlib import Path

import pytest
from PIL import Image

from evaluation import attacks
from mlvgm.cli.main import main
from tests.evaluation.models import of_bundle, pictures

pytest.importorskip("foolbox")


@pytest.fixture
def words(tmp_path: Path, nvae_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a tiny bundle and photographs in folders."""
    monkeypatch.setattr(attacks, "load_target", lambda _recipe, _file: of_bundle(nvae_bundle))
    monkeypatch.chdir(tmp_path)
    for i, pixels in enumerate(pictures(9)):
        path = tmp_path / "data" / "validation" / str(i % 3) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    data = ["--bundle", str(nvae_bundle), "--data", str(tmp_path / "data")]
    return ["tune", *data, "--attacks", "deepfool", "--out", "tuned.json"]


def test_finds_and_writes_weights(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--images", "5", "--check", "4", "--trials", "26", "--finalists", "2", "--samples", "2"]) == 0
    content = json.loads(Path("tuned.json").read_text())
    assert len(content["trials"]) <= 26
    assert len(content["finalists"]) == 2
    assert content["alphas"] == content["finalists"][0]["alphas"]
    assert content["finalists"][0]["score"] >= content["finalists"][1]["score"]
    assert content["as_it_is"]["alphas"] == [0.5, 1.0]
    captured = capsys.readouterr()
    assert f"tuned: [{', '.join(f'{a:g}' for a in content['alphas'])}]" in captured.out
    assert "1/26" in captured.err


def test_refuses_what_cannot_work(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--images", "9"]) == 2
    assert "9 validation images, too few" in capsys.readouterr().err
    assert main([*words, "--trials", "0"]) == 2
