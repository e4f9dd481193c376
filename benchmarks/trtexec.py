"""Command lines of ``trtexec`` for a bundle, and the times that it reports.

The exact lines are of use where TensorRT is installed as a whole; the packages of pip hold no ``trtexec``.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import report
from handlers.errors import MlvgmError
from handlers.manifest import Manifest, StageSpec

PROGRAM = "trtexec"


class TrtexecError(MlvgmError):
    """``trtexec`` failed, or reported something else than times."""


def measure(bundle: Path, work: Path, say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """One row per stage and batch: ``stage``, ``batch``, ``command`` and, where trtexec is on PATH, its times.

    Times are ``median_ms``, ``mean_ms`` and ``p99_ms`` of a call's computation on the GPU, and ``images_per_s``. They
    are those of the stage alone, with inputs that lie on the device already.

    Raises:
        BundleError: the bundle is damaged.
        TrtexecError: trtexec fails; its own last words are part of the message.
    """
    manifest = Manifest.read(bundle)
    sizes = manifest.batch
    profile = {"--minShapes": sizes.min, "--optShapes": sizes.opt, "--maxShapes": sizes.max}
    work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for stage in manifest.stages:
        # Built before the first measurement: an engine that lies there may be another bundle's.
        build = [f"--onnx={bundle / stage.file}", "--stronglyTyped"]
        build += [f"{option}={_shapes(stage, rows)}" for option, rows in profile.items()]
        build += [f"--saveEngine={work / stage.name}.engine", f"--timingCacheFile={work / 'timing.cache'}"]
        for batch in sorted({sizes.min, sizes.opt, sizes.max}):
            times = work / f"{stage.name}-{batch}.json"
            line = [PROGRAM, *build, f"--shapes={_shapes(stage, batch)}", f"--exportTimes={times}"]
            line += ["--useCudaGraph", "--noDataTransfers", "--useSpinWait"]
            build = [f"--loadEngine={work / stage.name}.engine"]
            row: dict[str, Any] = {"stage": stage.name, "batch": batch, "command": shlex.join(line)}
            if shutil.which(PROGRAM):
                say(f"{stage.name}, batch {batch}")
                row |= _run(line, times, batch)
            rows.append(row)
    return rows


def _shapes(stage: StageSpec, rows: int) -> str:
    """As trtexec takes them; inputs without a batch axis have fixed shapes and are left out."""
    return ",".join(
        f"{tensor.name}:{'x'.join(str(rows if n == 'B' else n) for n in tensor.shape)}"
        for tensor in stage.inputs
        if "B" in tensor.shape
    )


def _run(line: Sequence[str], times: Path, batch: int) -> dict[str, Any]:
    times.unlink(missing_ok=True)  # times of an earlier run must not pass for those of this one
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode:
        last = " ".join(output.strip().splitlines()[-3:])
        raise TrtexecError(f"trtexec ended with code {done.returncode}: {last[-500:]}")
    version = re.search(r"\[TensorRT v(\d+)\]", output)
    return summary(times, batch) | {"trtexec": version[1] if version else None}


def summary(times: Path, batch: int) -> dict[str, Any]:
    """Median, mean and 99th percentile of what ``--exportTimes`` wrote: a list with ``computeMs`` for each call.

    Raises:
        TrtexecError: the file is not there, or holds no times.
    """
    try:
        calls = [float(call["computeMs"]) for call in json.loads(times.read_text())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrtexecError(f"{times}: no times of trtexec ({type(error).__name__}: {error})") from None
    if not calls:
        raise TrtexecError(f"{times}: no call was timed")
    median = float(np.median(calls))
    return {
        "calls": len(calls),
        "median_ms": median,
        "mean_ms": float(np.mean(calls)),
        "p99_ms": float(np.quantile(calls, 0.99)),
        "images_per_s": 1000.0 * batch / median,
    }


def markdown(content: Mapping[str, Any]) -> str:
    """The measured rows as a table, and the command lines; without any measured row, these alone."""
    rows = content["rows"]
    lines = ["```", *(row["command"] for row in rows), "```"]
    if measured := [row for row in rows if "median_ms" in row]:
        keys = ("median_ms", "mean_ms", "p99_ms")
        cells = [
            [row["stage"], row["batch"], *(f"{row[key]:.3f}" for key in keys), f"{row['images_per_s']:.1f}"]
            for row in measured
        ]
        header = ["stage", "batch", "median, ms", "mean, ms", "p99, ms", "images/s"]
        lines = [*report.table(header, cells), "", *lines]
    return "\n".join(lines) + "\n"
