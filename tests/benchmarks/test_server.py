"""``mlvgm bench server`` on a tiny bundle and a real TorchServe."""

import contextlib
import json
import tempfile
from pathlib import Path

import pytest

from benchmarks.server import report
from deploy import trial
from mlvgm.cli.main import main

psutil = pytest.importorskip("psutil")
pytest.importorskip("ts", reason="needs TorchServe")


@pytest.mark.server
def test_the_whole_course(nvae_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    file = tmp_path / "server.json"
    words = ["bench", "server", "--bundle", str(nvae_bundle), "--seconds", "0.5", "--rounds", "1"]
    asked = ["--hostile", "400", "--kills", "1", "--overload", "3", "--soak", "1"]
    assert main([*words, *asked, "--runtime", "onnxruntime", "--threads", "1", "--json", str(file)]) == 0
    content = json.loads(file.read_text())

    saturation = content["saturation"]
    assert saturation["server_images_per_s"] > 0
    assert saturation["ratio"] == pytest.approx(
        saturation["server_images_per_s"] / saturation["in_process_images_per_s"]
    )
    assert 0 < saturation["p50_ms"] <= saturation["p99_ms"]
    assert saturation["failed"] == 0
    assert set(saturation["median"]) == {"in process", "TorchServe", "development server"}
    assert [row["fraction"] for row in saturation["open_load"]] == [0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0]

    hostile = content["hostile"]
    assert hostile["requests"] == 400
    assert 150 < hostile["valid"] < 250
    assert (hostile["valid_wrong"], hostile["hostile_not_4xx"], hostile["worker_deaths"]) == (0, 0, 0), hostile["wrong"]
    assert (hostile["through"], hostile["torchserve_500"] == 0) == (
        ("nginx", True) if trial.is_possible() else ("TorchServe", False)
    )
    assert hostile["memory_growth"] < 0.5

    assert [seconds > 0 for seconds in content["kills"]["recovery_s"]] == [True]
    assert (content["kills"]["lost"], content["kills"]["wrong"]) == (0, 0)
    assert content["kills"]["correct"] > 0
    overload = content["overload"]
    assert overload["goodput_ratio"] > 0
    assert overload["lost"] == 0
    assert content["soak"]["failed"] == 0

    page = file.with_suffix(".md").read_text()
    headings = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["Saturation", "Hostile requests", "Overload", "Soak", "Killed workers"]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.iterdir()) == []
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(folder) in str(process.info["cmdline"])]


def test_a_report_of_a_server_that_answered_nothing(tmp_path: Path) -> None:
    row = {"fraction": 0.5, "offered_per_s": 1.0, "achieved_per_s": 0.0, "requests": 3, "refused": 0, "failed": 3}
    row |= dict.fromkeys(("p50_ms", "p90_ms", "p99_ms", "late_p99_ms"))
    machine = {"processor": "P", "cores": 2, "python": "3", "packages": {}}
    settings = {"samples": 1, "batch": 1, "runtime": "r", "precision": "fp32", "workers": 1, "threads": 0}
    rates = {"in process": 2.0, "TorchServe": 1.0}
    content = {
        "bundle": "b",
        "machine": machine,
        "date": "d",
        "settings": settings | {"background_cores": 0.0},
        "saturation": {
            "in_process_images_per_s": 2.0,
            "clients": 3,
            "rounds": {name: [rate] for name, rate in rates.items()},
            "median": rates,
            "generator_cpu_us": 1.0,
            "open_load": [row],
        },
    }
    assert "| TorchServe | 1 | 1 | 50% |" in report.markdown(content, {})
    report.plot(content, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "--seconds: must be a number above 0"),
        (["--hostile", "-1"], "--hostile: must be a whole number from 0"),
        (["--samples", "99"], "samples must be 1 to 16"),
    ],
)
def test_wrong_arguments_are_refused(
    words: list[str], message: str, nvae_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["bench", "server", "--bundle", str(nvae_bundle), *words]) == 2
    assert message in capsys.readouterr().err
