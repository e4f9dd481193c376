"""``mlvgm bench trtexec``: lines that trtexec takes, and figures that are those of its file."""

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.trtexec import TrtexecError, markdown, measure, summary
from handlers.manifest import Batch, Manifest
from mlvgm.cli.main import main
from tests import bundles

FAKE = """#!{python}
import json, sys
from pathlib import Path
options = dict(a[2:].partition("=")[::2] for a in sys.argv[1:])
if "onnx" in options:
    assert Path(options["onnx"]).is_file() and "stronglyTyped" in options
    Path(options["saveEngine"]).write_bytes(b"engine")
else:
    assert Path(options["loadEngine"]).read_bytes() == b"engine"
print("&&&& RUNNING TensorRT.trtexec [TensorRT v101300] [b26] # trtexec " + " ".join(sys.argv[1:]))
if {fail}:
    print("[E] Cuda failure: no CUDA-capable device is detected", file=sys.stderr)
    print("&&&& FAILED TensorRT.trtexec [TensorRT v101300]")
    sys.exit(1)
rows = int(options["shapes"].partition(":")[2].partition("x")[0])
calls = [
    {{
        "startEnqMs": 2 * i, "endEnqMs": 2 * i + 0.1, "startInMs": 2 * i, "endInMs": 2 * i,
        "startComputeMs": 2 * i, "endComputeMs": 2 * i + rows, "startOutMs": 2 * i + rows, "endOutMs": 2 * i + rows,
        "inMs": 0, "computeMs": rows + i / 100, "outMs": 0, "latencyMs": rows + 9.0, "enqueueMs": 0.1
    }}
    for i in range(5)
]
Path(options["exportTimes"]).write_text(json.dumps(calls))
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    bundles.write_nvae(tmp_path / "bundle", batch=Batch(1, 4, 8))
    return tmp_path / "bundle"


def put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, fail: bool = False) -> None:
    folder.mkdir()
    program = folder / "trtexec"
    program.write_text(FAKE.format(python=sys.executable, fail=fail))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_lines_name_every_input_with_a_batch_and_no_other(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = measure(bundle, tmp_path / "work")
    stages = Manifest.read(bundle).stages
    assert [(row["stage"], row["batch"]) for row in rows] == [(s.name, b) for s in stages for b in (1, 4, 8)]
    assert all(set(row) == {"stage", "batch", "command"} for row in rows)
    build, later = (row["command"].split() for row in rows if row["stage"] == "decode" and row["batch"] in (1, 8))
    maps = "feature_0:{0}x2x2x2,feature_1:{0}x2x4x4,noise_0:{0}x2x2x2,noise_1:{0}x2x4x4"
    assert build[:3] == ["trtexec", f"--onnx={bundle / 'decode.onnx'}", "--stronglyTyped"]
    for option, batch in (("min", 1), ("opt", 4), ("max", 8)):
        assert f"--{option}Shapes={maps.format(batch)}" in build
    assert f"--shapes={maps.format(1)}" in build
    assert f"--exportTimes={tmp_path / 'work' / 'decode-1.json'}" in build
    assert f"--shapes={maps.format(8)}" in later
    assert f"--loadEngine={tmp_path / 'work' / 'decode.engine'}" in later
    assert not any(part.startswith("--onnx") for part in later)


def test_figures_are_those_of_its_file(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_on_path(tmp_path / "bin", monkeypatch)
    assert main(["bench", "trtexec", str(bundle), "--json", str(tmp_path / "out" / "times.json")]) == 0
    content = json.loads((tmp_path / "out" / "times.json").read_text())
    row = next(row for row in content["rows"] if (row["stage"], row["batch"]) == ("decode", 4))
    assert row["calls"] == 5
    assert row["median_ms"] == pytest.approx(4.02)
    assert row["mean_ms"] == pytest.approx(4.02)
    assert row["p99_ms"] == pytest.approx(4.0396)
    assert row["images_per_s"] == pytest.approx(4000 / 4.02)
    assert row["trtexec"] == "101300"
    assert "| decode | 4 | 4.020 | 4.020 | 4.040 | 995.0 |" in (tmp_path / "out" / "times.md").read_text()
    assert "nothing is run" not in capsys.readouterr().out
    Manifest.read(bundle)  # nothing was written into it
    assert (tmp_path / "bundle-trtexec" / "decode.engine").is_file()


def test_without_trtexec_only_the_lines_are_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["bench", "trtexec", str(bundle), "--json", str(tmp_path / "lines.json")]) == 0
    out = capsys.readouterr().out
    assert "trtexec is not on PATH: nothing is run" in out
    assert out.count("--exportTimes=") == 9
    assert "images/s" not in out
    assert not any("median_ms" in row for row in json.loads((tmp_path / "lines.json").read_text())["rows"])


def test_a_failure_is_told_in_its_own_words(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_on_path(tmp_path / "bin", monkeypatch, fail=True)
    assert main(["bench", "trtexec", str(bundle)]) == 2
    assert "trtexec ended with code 1: " in (error := capsys.readouterr().err)
    assert "no CUDA-capable device is detected" in error


@pytest.mark.parametrize("content", ["", "[]", "{}", '[{"latencyMs": 1}]', None])
def test_a_file_without_times_is_an_error(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "times.json").write_text(content)
    with pytest.raises(TrtexecError, match=r"times\.json"):
        summary(tmp_path / "times.json", 1)


def test_the_table_of_nothing_measured_holds_no_figures() -> None:
    assert markdown({"rows": [{"stage": "encode", "batch": 1, "command": "trtexec --x"}]}) == "```\ntrtexec --x\n```\n"
