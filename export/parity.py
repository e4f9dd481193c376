"""The parity report: every exported stage, and the whole pipeline, against the eager twin with published operators."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.stage import Stage, as_tuple
from export.trace import example
from handlers import runtimes

FloatArray = NDArray[np.floating[Any]]


class ParityError(RuntimeError):
    """An exported stage does not compute what its eager twin computes."""


@dataclass(frozen=True)
class Comparison:
    """One output at one batch size against its twin: relative L2 error and largest difference."""

    stage: str
    output: str
    batch: int
    relative_error: float
    max_difference: float


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
) -> list[Comparison]:
    """Run each stage's file at each batch size and compare it with the twin.

    Each stage gets what the *twins* of the stages before it gave, so that an error is reported where it arises.
    """
    engines = {
        stage.name: runtimes.load(runtime, files[stage.name], runtimes.Options(precision="fp32")) for stage in stages
    }
    comparisons = []
    try:
        for batch in batches:
            progress(f"comparing with the eager twin at batch {batch}")
            known: dict[str, Tensor] = {}
            for stage in stages:
                for i, named in enumerate(stage.inputs):
                    known.setdefault(named[0], example(named, batch, seed=1000 * batch + i))
                inputs = [known[name] for name, _ in stage.inputs]
                with torch.inference_mode():
                    expected = as_tuple(stage.twin(*inputs))
                feeds = {name: known[name].numpy() for name, _ in stage.inputs}
                found = engines[stage.name].run(feeds)
                for (name, _), twin in zip(stage.outputs, expected, strict=True):
                    comparisons.append(_compare(stage.name, name, batch, found[name], twin.numpy()))
                    known[name] = twin
    finally:
        for engine in engines.values():
            engine.close()
    return comparisons


def check(comparisons: Sequence[Comparison], limit: float) -> None:
    """Raises ParityError naming the worst output, where one is over ``limit``."""
    worst = max(comparisons, key=lambda c: c.relative_error)
    if worst.relative_error > limit:
        raise ParityError(
            f"stage {worst.stage}: {worst.output} is {worst.relative_error:.1e} off its eager twin at batch "
            f"{worst.batch} (relative L2 error; the limit is {limit:.0e}): nothing was written"
        )


def report(comparisons: Sequence[Comparison], limit: float) -> dict[str, Any]:
    """The comparisons as the manifest keeps them: the worst per stage and output, over all batch sizes."""
    worst: dict[tuple[str, str], Comparison] = {}
    for c in comparisons:
        key = (c.stage, c.output)
        if key not in worst or c.relative_error > worst[key].relative_error:
            worst[key] = c
    return {
        "limit": limit,
        "batches": sorted({c.batch for c in comparisons}),
        "worst": [asdict(c) for c in worst.values()],
    }


def _compare(stage: str, output: str, batch: int, found: FloatArray, expected: FloatArray) -> Comparison:
    if found.shape != expected.shape:
        raise ParityError(f"stage {stage}: {output} has shape {found.shape} at batch {batch}, not {expected.shape}")
    difference = float(np.abs(found - expected).max())
    return Comparison(stage, output, batch, relative_error(found, expected), difference)
