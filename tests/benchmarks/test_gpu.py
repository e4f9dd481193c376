"""The GPU's run, rehearsed on the CPU with tiny models: every case, and processes that die."""

import json
import math
import signal
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import BESIDE, FIELDS, GROUPS, main, measure, run
from benchmarks.gpu.bench import Bench, compared
from benchmarks.gpu.cases import GROUPS as CASES

Row = dict[str, object]


def rows_in(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


def test_every_case_gives_a_row_without_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: others would spend most of the time on imports."""
    assert {*GROUPS, *BESIDE.values()} == CASES.keys()
    bench = Bench(True, tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    for group in (*BESIDE.values(), *GROUPS):
        measure(tmp_path, group, math.inf, tmp_path, toy=True)
    rows = rows_in(tmp_path)
    assert [(row["group"], row["case"], row["error"]) for row in rows if row["error"]] == []
    expected = [(group, case.name, case.rows) for group in (*BESIDE.values(), *GROUPS) for case in CASES[group](bench)]
    assert [(row["group"], row["case"], row["rows"]) for row in rows] == expected
    for row in rows:
        assert tuple(row) == FIELDS
        assert row["ms"] or row["facts"] or row["group"] in BESIDE.values()
        case = str(row["case"])
        assert "profile" not in case or (row["kernels"] and row["top"])
        if case.split()[0] in ("encode", "decode", "blur", "depthwise") or "parity" in case:
            assert isinstance(row["relative_error"], float)
            assert isinstance(row["limit"], float)
            assert row["relative_error"] <= row["limit"]


def test_the_command_runs_from_the_tree_within_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it has none, so every row says that."""
    monkeypatch.setattr("benchmarks.gpu.__main__._GRACE", 60.0)
    options = ["--out", str(tmp_path / "out"), "--toy", "--seconds", "0", "--groups", "ceilings"]
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    before = signal.getsignal(signal.SIGTERM)
    assert main() == 1
    signal.signal(signal.SIGTERM, before)
    rows = rows_in(tmp_path / "out")
    assert [row["case"] for row in rows] == [case.name for case in CASES["ceilings"](Bench(True, tmp_path))]
    assert {row["error"] for row in rows} == {"TimeoutError: no time was left"}
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["rows"] == rows
    assert (tmp_path / "out" / "gpu.md").read_text().count("\n| ") == len(rows) + 2


def test_an_unknown_group_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", "out", "--groups", "nvae,ceiling,e4"])
    with pytest.raises(SystemExit):
        main()
    assert "there is no group ceiling, e4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("print('CUDA error: an illegal memory access', file=sys.stderr, flush=True); os.abort()", "illegal memory"),
        ("time.sleep(3600)", "timed out after"),
    ],
)
def test_a_process_that_dies_or_hangs_leaves_its_rows_and_the_next_one_runs(
    end: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__._GRACE", 15.0)  # longer than a busy machine takes to start one
    program = f"""
        import os, sys, time
        from pathlib import Path
        from benchmarks.gpu.__main__ import note
        group = sys.argv[sys.argv.index("--group") + 1]
        note(Path({str(tmp_path)!r}), {{"group": group, "case": "first", "rows": 2, "ms": 1.5}})
        if group == "bad":
            {end}
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    assert not run(tmp_path, command, {"bad": 1.0, "good": 1.0}, seconds=0)
    rows = rows_in(tmp_path)
    assert [(row["group"], row["case"], bool(row["error"])) for row in rows] == [
        ("bad", "first", False),
        ("bad", "all that is left", True),
        ("good", "first", False),
    ]
    assert words in str(rows[1]["error"])
    assert all(tuple(row) == FIELDS for row in rows)
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == rows


def test_what_needs_a_bundle_that_was_not_made_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__._GRACE", 60.0)
    command = [sys.executable, "-c", "import sys; sys.exit('write e4e' in sys.argv and 'no space left on device')"]
    assert not run(tmp_path, command, {"e4e product": 1.0, "nvae": 1.0}, seconds=0)
    made, needed = rows_in(tmp_path)
    assert (made["group"], needed["group"]) == ("write e4e", "e4e product")
    assert "no space left on device" in str(made["error"])
    assert needed["error"] == "needs what write e4e could not make"


def test_a_wrong_result_is_an_error() -> None:
    right = torch.ones(2, 3)
    assert compared([right + 1e-4], [right], 1e-3)["relative_error"] == pytest.approx(1e-4, rel=1e-2)
    for wrong in (right + 1e-2, right * torch.nan, right * torch.inf):
        with pytest.raises(ValueError, match="relative error"):
            compared([wrong], [right], 1e-3)
    with pytest.raises(ValueError, match="shapes"):
        compared([right[:1]], [right], 1e-3)
