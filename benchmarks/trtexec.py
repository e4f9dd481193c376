"""Command lines of ``trtexec`` for a bundle, and what it reports.

The exact lines are of use where TensorRT is installed as a whole; the packages of pip hold no ``trtexec``.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import report
from handlers.errors import MlvgmError
from handlers.manifest import Manifest, StageSpec

PROGRAM = "trtexec"


class TrtexecError(MlvgmError):
    """``trtexec`` failed, or reported something else than times."""


@dataclass(frozen=True)
class Profile:
    """One measurement of a stage: the engine's rows (min, opt, max), and the rows of the timed calls."""

    stage: str
    rows: tuple[int, int, int]
    timed: int


def profiles(manifest: Manifest) -> list[Profile]:
    """Every stage at the batch sizes of the manifest, each once."""
    rows = (manifest.batch.min, manifest.batch.opt, manifest.batch.max)
    return [Profile(stage.name, rows, timed) for stage in manifest.stages for timed in sorted(set(rows))]


def command(bundle: Path, stage: StageSpec, profile: Profile, work: Path, build: bool) -> list[str]:
    """The arguments that build the stage's engine, or load the one just built, and time it.

    Engine and times go to the folder ``work``, the times under a name of their own.
    """
    engine = work / f"{stage.name}.engine"
    arguments = [PROGRAM]
    if not build:
        arguments += [f"--loadEngine={engine}"]
    else:
        arguments += [f"--onnx={bundle / stage.file}", "--stronglyTyped", f"--saveEngine={engine}"]
        for option, rows in zip(("--minShapes", "--optShapes", "--maxShapes"), profile.rows, strict=True):
            arguments += [f"{option}={_shapes(stage, rows)}"]
        arguments += [f"--timingCacheFile={work / 'timing.cache'}"]
    arguments += [f"--shapes={_shapes(stage, profile.timed)}", "--useCudaGraph", "--noDataTransfers", "--useSpinWait"]
    return [*arguments, f"--exportTimes={times_file(work, profile)}"]


def times_file(work: Path, profile: Profile) -> Path:
    """Where the times of a measurement go."""
    return work / f"{profile.stage}-{profile.timed}.json"


def _shapes(stage: StageSpec, rows: int) -> str:
    """Only inputs with a batch axis have a shape to be told."""
    return ",".join(
        f"{tensor.name}:{'x'.join(str(rows if n == 'B' else n) for n in tensor.shape)}"
        for tensor in stage.inputs
        if "B" in tensor.shape
    )


def measure(bundle: Path, work: Path, say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """One row per stage and batch: ``stage``, ``batch``, ``command`` and, where trtexec is on PATH, its times.

    Times are ``median_ms``, ``mean_ms`` and ``p99_ms`` of a call's computation on the GPU, and ``images_per_s``. They
    are those of the stage alone, with inputs that lie on the device already.

    Raises:
        BundleError: the bundle is damaged.
        TrtexecError: trtexec fails; its own last words are part of the message.
    """
    manifest = Manifest.read(bundle)
    stages = {stage.name: stage for stage in manifest.stages}
    found = shutil.which(PROGRAM)
    work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for profile in profiles(manifest):
        first = all(row["stage"] != profile.stage for row in rows)  # an engine of an earlier run may be another's
        line = command(bundle, stages[profile.stage], profile, work, build=first)
        row: dict[str, Any] = {"stage": profile.stage, "batch": profile.timed, "command": shlex.join(line)}
        if found:
            say(f"{profile.stage}, batch {profile.timed}")
            row |= _run(line, times_file(work, profile), profile.timed)
        rows.append(row)
    return rows


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
    """The measured rows as a table; without any, the command lines alone."""
    rows = content["rows"]
    lines = []

    def times(row: Mapping[str, Any]) -> list[str]:
        return [f"{row[key]:.3f}" for key in ("median_ms", "mean_ms", "p99_ms")]

    if any("median_ms" in row for row in rows):
        lines += report.table(
            ["stage", "batch", "median, ms", "mean, ms", "p99, ms", "images/s"],
            [(row["stage"], row["batch"], *times(row), f"{row['images_per_s']:.1f}") for row in rows],
        )
        lines.append("")
    return "\n".join([*lines, "```", *(row["command"] for row in rows), "```"]) + "\n"
