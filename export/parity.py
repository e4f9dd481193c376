"""The parity report: every exported stage, and the whole pipeline, against the eager twin with published operators."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export import memory
from export.precision import LIMITS
from export.stage import Stage, as_tuple
from export.trace import example
from handlers import runtimes
from handlers.errors import MlvgmError

FloatArray = NDArray[np.floating[Any]]


END_TO_END = "end to end"
"""Stands for a stage where all of them ran in a chain."""

_TWIN_ROWS = 4


class ParityError(MlvgmError):
    """An exported stage does not compute what its eager twin computes."""


@dataclass(frozen=True)
class Comparison:
    """One output at one batch size against its twin: relative L2 error, largest difference, and the error allowed."""

    stage: str
    output: str
    batch: int
    relative_error: float
    max_difference: float
    limit: float


def relative_error(found: FloatArray, expected: FloatArray) -> float:
    """||found - expected|| / ||expected||; infinite where a value is not finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))
    return error if np.isfinite(error) else float("inf")


def compare_stages(
    stages: Sequence[Stage],
    files: Mapping[str, Path],
    batches: Sequence[int],
    runtime: str = "onnxruntime",
    progress: Callable[[str], None] = lambda _: None,
    precision: str = "fp32",
) -> list[Comparison]:
    """Run each stage's file at each batch size, and all of them in a chain at the largest, and compare with the twins.

    A stage on its own gets what the *twins* of the stages before it gave, so that an error is reported where it arises.
    One engine is in memory at a time.
    """
    largest = max(batches)
    known: dict[str, Tensor] = {}
    chained: dict[str, FloatArray] = {}
    comparisons = []
    for stage in stages:
        limit = max(LIMITS[precision], stage.tolerance)
        progress(f"comparing {stage.name} with its eager twin at batches {', '.join(map(str, batches))}")
        for i, named in enumerate(stage.inputs):
            known.setdefault(named[0], example(named, largest, seed=1000 * largest + i))
        expected = run_twin(stage, known)
        engine = runtimes.load(runtime, files[stage.name], runtimes.Options(precision=precision))
        try:
            for batch in sorted(batches):
                found = engine.run({name: tensor.numpy() for name, tensor in cut(stage, known, slice(batch)).items()})
                for name, _ in stage.outputs:
                    pair = found[name], expected[name][:batch].numpy()
                    comparisons.append(_compare(stage.name, name, batch, *pair, limit))
            if any(name in chained for name, _ in stage.inputs):
                found = engine.run({name: chained.get(name, known[name].numpy()) for name, _ in stage.inputs})
            chained |= found
        finally:
            engine.close()
            memory.release()
        known |= expected
    for name in ("images", "logits"):
        if name in chained:
            pair, last = (chained[name], known[name].numpy()), LIMITS[precision] if name == "images" else limit
            comparisons.append(_compare(END_TO_END, name, largest, *pair, last))
    return comparisons


def run_twin(stage: Stage, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the twin gives, a few rows at a time: the published operators keep large maps in memory."""
    count = next(len(known[name]) for name, shape in stage.inputs if "B" in shape)
    with torch.inference_mode():
        parts = [
            as_tuple(stage.twin(*cut(stage, known, slice(start, start + _TWIN_ROWS)).values()))
            for start in range(0, count, _TWIN_ROWS)
        ]
    whole = [torch.cat(outputs) for outputs in zip(*parts, strict=True)]
    return {name: tensor for (name, _), tensor in zip(stage.outputs, whole, strict=True)}


def cut(stage: Stage, known: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """The inputs of ``stage``, in their order, with these rows of those that have a batch axis."""
    return {name: known[name][rows] if "B" in shape else known[name] for name, shape in stage.inputs}


def check(comparisons: Sequence[Comparison]) -> None:
    """Raises ParityError naming the worst output, where one is over its limit."""
    worst = max(comparisons, key=lambda c: c.relative_error / c.limit)
    if worst.relative_error > worst.limit:
        raise ParityError(
            f"stage {worst.stage}: {worst.output} is {worst.relative_error:.1e} off its eager twin at batch "
            f"{worst.batch} (relative L2 error; the limit is {worst.limit:.0e}): nothing was written"
        )


def report(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The comparisons as the manifest keeps them: the worst per stage and output, over all batch sizes."""
    worst: dict[tuple[str, str], Comparison] = {}
    for c in comparisons:
        key = (c.stage, c.output)
        if key not in worst or c.relative_error > worst[key].relative_error:
            worst[key] = c
    return {
        "batches": sorted({c.batch for c in comparisons}),
        "worst": [asdict(c) for c in worst.values()],
    }


def _compare(stage: str, output: str, batch: int, found: FloatArray, expected: FloatArray, limit: float) -> Comparison:
    if found.shape != expected.shape:
        raise ParityError(f"stage {stage}: {output} has shape {found.shape} at batch {batch}, not {expected.shape}")
    difference = float(np.abs(found - expected).max())
    return Comparison(stage, output, batch, relative_error(found, expected), difference, limit)
