"""Stages and their references, the published operators in eager fp32: run, and compared with what was exported.

`mlvgm export` compares every stage, and all of them in a chain, before a bundle is written; `mlvgm verify` and
`mlvgm bench stages` run the references of a bundle.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export import memory
from export.precision import LIMITS
from export.stage import Stage, as_tuple
from export.trace import example
from handlers import runtimes
from handlers.arrays import AnyFloats
from handlers.errors import MlvgmError
from handlers.manifest import StageSpec
from handlers.runtimes import Array, Engine

END_TO_END = "end to end"
"""Stage name of a comparison in which all stages ran in a chain."""


class ParityError(MlvgmError):
    """An exported stage is further from its reference than its precision allows."""


@dataclass(frozen=True)
class Comparison:
    """One output at one batch size against its reference: relative L2 error, largest difference, error limit.

    Attributes:
        equal_labels: share of the rows with the same label; of logits alone.
    """

    stage: str
    output: str
    batch: int
    relative_error: float
    max_difference: float
    limit: float
    equal_labels: float | None = None


def relative_error(found: AnyFloats, expected: AnyFloats) -> float:
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
    """Run each stage's file at each batch size, and all of them in a chain at the largest; compare with references.

    A single stage gets the outputs of the *references* of the stages before it, so that an error is reported for the
    stage that causes it. One engine is in memory at a time.
    """
    largest = max(batches)
    known: dict[str, Tensor] = {}
    limits: dict[str, float] = {}
    chained: dict[str, AnyFloats] = {}
    comparisons = []
    for stage in stages:
        limit = max(LIMITS[precision], stage.tolerance)
        progress(f"comparing {stage.name} with its reference at batches {', '.join(map(str, batches))}")
        for i, spec in enumerate(stage.inputs):
            known.setdefault(spec.name, example(spec, largest, seed=1000 * largest + i))
        expected = run_reference(stage, known)
        memory.release()  # what PyTorch has kept of the weights in its own layout
        options = runtimes.EngineOptions(precision=precision)
        with closing(runtimes.load(runtime, files[stage.name], options)) as engine:
            for batch in sorted(batches):
                found = run_engine(engine, stage, slice_batch(stage, known, slice(batch)), batch)
                for spec in stage.outputs:
                    pair = found[spec.name], expected[spec.name][:batch].numpy()
                    comparisons.append(_compare(stage.name, spec.name, batch, *pair, limit))
            names = [spec.name for spec in stage.inputs]
            if not chained.keys().isdisjoint(names):
                found = engine.run({name: chained.get(name, known[name].numpy()) for name in names})
            chained |= found
        memory.release()
        known |= expected
        limits |= dict.fromkeys(expected, limit)
    for name in ("images", "logits"):
        if name in chained:
            pair = np.asarray(chained[name]), known[name].numpy()
            comparisons.append(_compare(END_TO_END, name, largest, *pair, limits[name]))
    return comparisons


def run_reference(stage: Stage, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of the stage's reference, row by row: the published operators at 1024 px need 2.8 GB for each."""
    count = next(len(known[spec.name]) for spec in stage.inputs if spec.batched)
    with torch.inference_mode():
        parts = [
            as_tuple(stage.reference(*slice_batch(stage, known, slice(row, row + 1)).values())) for row in range(count)
        ]
    whole = [torch.cat(outputs) for outputs in zip(*parts, strict=True)]
    return {spec.name: tensor for spec, tensor in zip(stage.outputs, whole, strict=True)}


def run_engine(engine: Engine, stage: Stage, known: Mapping[str, Any], batch: int) -> dict[str, AnyFloats]:
    """Outputs of ``engine``, the exported form of ``stage``, ``batch`` rows of tensors or arrays at a time."""
    count = next(len(known[spec.name]) for spec in stage.inputs if spec.batched)
    parts = []
    for start in range(0, count, batch):
        feeds = slice_batch(stage, known, slice(start, start + batch))
        parts.append(engine.run({name: np.asarray(tensor) for name, tensor in feeds.items()}))
    return {spec.name: np.concatenate([np.asarray(part[spec.name]) for part in parts]) for spec in stage.outputs}


class ReferenceEngine:
    """Lets a pipeline run a function of tensors (a stage's reference, or a module) as if it were an engine."""

    def __init__(self, stage: Stage | StageSpec, function: Callable[..., Tensor | Sequence[Tensor]]) -> None:
        self._stage, self._function = stage, function

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        tensors = (torch.from_numpy(np.asarray(inputs[spec.name])) for spec in self._stage.inputs)
        with torch.inference_mode():
            outputs = as_tuple(self._function(*tensors))
        return {spec.name: tensor.numpy() for spec, tensor in zip(self._stage.outputs, outputs, strict=True)}

    def close(self) -> None:
        del self._function


def slice_batch(stage: Stage, known: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """The inputs of ``stage``, in order; those with a batch axis are cut to ``rows``."""
    return {spec.name: known[spec.name][rows] if spec.batched else known[spec.name] for spec in stage.inputs}


def check(comparisons: Sequence[Comparison]) -> None:
    """Raises ParityError, naming the worst output, if any output is over its limit."""
    worst = max(comparisons, key=lambda c: c.relative_error / c.limit)
    if worst.relative_error > worst.limit:
        raise ParityError(
            f"stage {worst.stage}: {worst.output} is {worst.relative_error:.1e} off its reference at batch "
            f"{worst.batch} (relative L2 error; the limit is {worst.limit:.0e}): nothing was written"
        )


def report(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The comparisons as the manifest stores them: the worst per stage and output, over all batch sizes."""
    worst: dict[tuple[str, str], Comparison] = {}
    for c in comparisons:
        key = (c.stage, c.output)
        if key not in worst or c.relative_error > worst[key].relative_error:
            worst[key] = c
    return {
        "batches": sorted({c.batch for c in comparisons}),
        "worst": [asdict(c) for c in worst.values()],
    }


def _compare(stage: str, output: str, batch: int, found: AnyFloats, expected: AnyFloats, limit: float) -> Comparison:
    if found.shape != expected.shape:
        raise ParityError(f"stage {stage}: {output} has shape {found.shape} at batch {batch}, not {expected.shape}")
    difference = float(np.abs(found - expected).max())
    equal = float((found.argmax(1) == expected.argmax(1)).mean()) if output == "logits" else None
    return Comparison(stage, output, batch, relative_error(found, expected), difference, limit, equal)
