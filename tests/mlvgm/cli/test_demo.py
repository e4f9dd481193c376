import json
from pathlib import Path

import pytest

from deploy.errors import CliError
from mlvgm.cli import demo
from mlvgm.cli.main import main
from tests.evaluation.models import shipped


def test_the_server_is_stopped_when_something_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []

    class Server:
        port = 1

        def __init__(self, _port: int) -> None: ...

        def start(self, _archives: object) -> None:
            raise CliError("no Java")

        def stop(self) -> None:
            events.append("stopped")

    monkeypatch.setattr(demo, "TorchServe", Server)
    monkeypatch.setattr("export.bundle.export_bundle", lambda *_: None)
    monkeypatch.setattr("export.archive.build_archive", lambda *_: tmp_path / "x.mar")
    monkeypatch.setattr("evaluation.demo.attack_signs", lambda _default, signs: [sign.image for sign in signs])
    assert main(["demo", "--build", str(tmp_path)]) == 2
    assert events == ["stopped"]
    assert len(list((tmp_path / "attacked-signs").glob("*.png"))) == 14


@pytest.mark.full
@pytest.mark.server
def test_the_whole_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped()
    pytest.importorskip("ts")
    monkeypatch.setenv("MLVGM_STATE", str(tmp_path / "serve"))
    assert main(["demo", "--build", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "demo.json").read_text())
    assert {"name", "true", "clean", "attacked", "purified", "agreement", "flagged"} <= content["images"][0].keys()
    counts = content["counts"]
    assert counts["clean"] == counts["images"] >= 12
    assert counts["fooled"] == counts["server_agrees_with_eager"] == counts["images"]
    assert counts["purified"] >= counts["images"] - 3
