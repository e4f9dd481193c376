"""`python -m benchmarks.gpu --out FOLDER`: what a GPU does with the product, one process for each group of cases.

Every row is a line of FOLDER/gpu.jsonl as soon as it is made. A case that fails is a row with an error. So is the end
of a group that dies or outlives its time, and the next one starts: a broken CUDA context ends with its process.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation import report

Row = dict[str, Any]

GROUPS = {
    "ceilings": 40,
    "e4e": 70,
    "e4e compiled": 90,
    "nvae": 50,
    "nvae compiled": 100,
    "e4e product": 130,
    "road-signs": 80,
}
"""Seconds of each, in the order they run (`benchmarks.gpu.cases` has them)."""

BESIDE = {"e4e product": "write e4e", "road-signs": "export road-signs"}
"""Groups that run on the CPU from the start, by the group that waits for what they make."""

_THREADS_BESIDE = str(max(1, (os.cpu_count() or 1) // 4))
"""Of those groups: the compiler of the groups that are measured needs most of the CPU."""

FIELDS = (
    *("time", "group", "case", "rows", "device", "ms", "ms_p90", "repeats", "per_s", "setup_s", "predicted_ms"),
    *("tflops", "gb_per_s", "relative_error", "limit", "kernels", "top", "allocated_gb", "facts", "error"),
)
"""Of every row; what a case does not measure is None.

``ms``: of one call, the median. ``tflops``: 10^12 operations a second. ``gb_per_s``: of the bytes that a case must move
at least. ``relative_error``: L2, against the published operators in fp32 on the same device, at most ``limit``.
``top``: the costliest kernels as [name, calls, microseconds]. ``facts``: what else was seen.
"""

_GRACE = 5.0  # seconds that a process may take to end after its time


def run(out: Path, command: Sequence[str], groups: Mapping[str, float], seconds: float) -> bool:
    """Measure ``groups`` within ``seconds``, what they need of `BESIDE` beside them; whether no row has an error.

    Args:
        command: is given "--group", its name, "--until" and a time (of `time.time`), and notes its rows in ``out``.
        groups: a share of the time for each; what one leaves is the next one's.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.jsonl").write_text("")
    begun = time.time()
    # The last seconds are kept for a process that must be killed.
    last, passed = begun + seconds - _GRACE, list(itertools.accumulate(groups.values()))
    ends = [min(begun + seconds * share / passed[-1], last) for share in passed]
    beside = {
        group: threading.Thread(target=_measure, args=(out, command, BESIDE[group], end))
        for group, end in zip(groups, ends, strict=True)
        if group in BESIDE
    }
    for thread in beside.values():
        thread.start()
    for group, end in zip(groups, ends, strict=True):
        if group in beside:
            beside[group].join()
        if any(row["error"] for row in _rows(out) if row["group"] == BESIDE.get(group)):
            note(out, {"group": group, "case": "all", "error": f"needs what {BESIDE[group]} could not make"})
        else:
            _measure(out, command, group, min(max(end, time.time()), last))
        content = {**report.measured_here(), "rows": _rows(out)}
        report.save(content, page(content), out / "gpu.json")
    return not any(row["error"] for row in _rows(out))


def _rows(out: Path) -> list[Row]:
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def _measure(out: Path, command: Sequence[str], group: str, until: float) -> None:
    log = out / f"{group.replace(' ', '-')}.log"
    left = max(until - time.time(), 0) + _GRACE
    threads = {"OMP_NUM_THREADS": _THREADS_BESIDE} if group in BESIDE.values() else {}
    with log.open("w") as errors:
        try:
            subprocess.run(
                [*command, "--group", group, "--until", str(until)],
                env=os.environ | threads,
                stderr=errors,
                timeout=left,
                check=True,
            )
        except subprocess.SubprocessError as error:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            note(out, {"group": group, "case": "all that is left", "error": f"{last}\n{error}"})


def note(out: Path, row: Row) -> None:
    """One line, which no later crash can take away."""
    row = {**dict.fromkeys(FIELDS), "time": round(time.time(), 2), **row}
    with (out / "gpu.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    print(*(_shown(row[name]) for name in ("group", "case", "rows", "ms", "error")), sep="; ", flush=True)


def page(content: report.Content) -> str:
    """The rows as Markdown."""
    names = [name for name in FIELDS if name not in ("time", "top", "facts")]
    table = ([_shown(row[name]) for name in names] for row in content["rows"])
    return "\n".join(["# Measured on a device", "", report.conditions(content), "", *report.table(names, table), ""])


def _shown(value: Any) -> str:
    """A number, or the last line of a text."""
    if isinstance(value, float):
        return report.digits(value)
    return str(value or "").strip().rpartition("\n")[2].replace("|", "\\|")


def measure(out: Path, group: str, until: float, work: Path, toy: bool) -> None:
    """The cases of one group, none of which is begun after ``until``."""
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.cases import GROUPS as CASES

    bench = Bench(toy, work)
    for case in CASES[group](bench):
        row: Row = {"group": group, "case": case.name, "rows": case.rows, "predicted_ms": case.predicted_ms}
        try:
            if time.time() > until:
                raise TimeoutError("no time was left")
            row |= {"device": bench.device_name, **case.run()}
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {str(error).strip()[:2000]}"
        note(out, row)


def _some(names: str) -> dict[str, int]:
    if unknown := set(names.split(",")) - GROUPS.keys():
        raise argparse.ArgumentTypeError(f"there is no group {', '.join(sorted(unknown))}")
    return {name: share for name, share in GROUPS.items() if name in names.split(",")}


def main() -> int:
    """Exit status 1 where any row has an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--groups", type=_some, default=GROUPS, help=f"only some of: {','.join(GROUPS)}")
    parser.add_argument("--seconds", type=float, default=540, help="the most that the run takes (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="a rehearsal on the CPU, whose times mean nothing")
    for own in ("--group", "--until", "--work"):  # of the processes that it starts
        parser.add_argument(own, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.group:
        measure(options.out, options.group, float(options.until), Path(options.work), options.toy)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process it has started ends with it
    with tempfile.TemporaryDirectory() as work:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{work}/inductor")
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(options.out), "--work", work]
        return 0 if run(options.out, command + ["--toy"] * options.toy, options.groups, options.seconds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
