"""Measure which CPU runtime answers a bundle's requests fastest on this machine."""

import math
import statistics
import time
from pathlib import Path

import numpy as np

from handlers import runtimes
from handlers.arrays import FloatArray, Pixels
from handlers.errors import MlvgmError
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline
from handlers.runtimes import choice
from handlers.runtimes.choice import Choice

MARGIN = 1.05
"""How many times as fast as the usual runtime another one must be to be chosen."""

_SECONDS = 0.5  # of runs of one batch size; two runs at least
_ROWS = 16  # of the batch
_ANSWER_SECONDS = 2.0  # of an answer that is measured with all its samples
_STEADY = 1.5  # with a larger ratio of the median to the fastest run, something else has computed meanwhile
_LIMITS = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 0.3}  # relative L2 error of the logits: ten times a stage's (export)


def measure(folder: Path) -> Choice:
    """Run the bundle in ``folder`` in each runtime that "auto" may be, one after the other; keep and return the choice.

    A runtime must agree with ONNX Runtime, whose results were compared with PyTorch's at export. Takes a few seconds,
    as long as it takes to load the bundle in each, and for a large model some answers of one sample.

    Raises:
        BundleError: the bundle is damaged.
        RuntimeMissing: there is no runtime.
    """
    manifest, usual = Manifest.read(folder), runtimes.choose("auto")
    names = runtimes.candidates()
    if len(names) == 1:
        return Choice(usual, "no other is installed", {})
    counts = {"one image": 1, "a batch": max(1, _ROWS // manifest.samples.typical)}  # the same, with many samples
    found: dict[str, dict[str, float]] = {}
    logits, samples, steady = {}, 0, True
    for name in reversed(names):  # ONNX Runtime first
        found[name] = {}
        try:
            with Pipeline.load(folder, name) as pipeline:
                samples = samples or _samples(pipeline)
                taken = {count: _times(pipeline, count, samples) for count in set(counts.values())}
                times = {what: taken[count] for what, count in counts.items()}
                logits[name] = pipeline.run(_images(manifest, 1), samples, [0]).sample_logits
        except MlvgmError:
            continue
        if _error(logits[name], next(iter(logits.values()))) <= _LIMITS[manifest.precision]:
            steady &= all(statistics.median(ms) <= _STEADY * min(ms) for ms in times.values())
            found[name] = {what: min(ms) for what, ms in times.items()}
    made = Choice(*_chosen(usual, found), found) if steady else Choice(usual, "the machine was busy", found)
    if steady:
        choice.keep(manifest, made)
    return made


def _chosen(usual: str, found: dict[str, dict[str, float]]) -> tuple[str, str]:
    """The runtime and the reason."""
    working = {name: math.prod(ms.values()) for name, ms in found.items() if ms}
    if not working:
        return usual, "none could be measured"
    if usual not in working:
        return min(working, key=lambda name: working[name]), f"{usual} fails"
    gain, fastest = max((math.sqrt(working[usual] / product), name) for name, product in working.items())
    if gain < MARGIN:
        return usual, "none is faster by a twentieth"
    return fastest, f"{gain:.2f} times as fast as {usual}"


def _samples(pipeline: Pipeline) -> int:
    """As many as an answer usually has, but one where they take long: each takes as long as the others."""
    images, usual = _images(pipeline.manifest, 1), pipeline.manifest.samples.typical
    pipeline.run(images, 1, [0])
    start = time.perf_counter()
    pipeline.run(images, 1, [0])
    return usual if usual * (time.perf_counter() - start) <= _ANSWER_SECONDS else 1


def _times(pipeline: Pipeline, count: int, samples: int) -> list[float]:
    """Milliseconds of each run of a request with ``count`` images, after a first one."""
    images = _images(pipeline.manifest, count)
    pipeline.run(images, samples, range(count))
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < 1000 * _SECONDS:
        start = time.perf_counter()
        pipeline.run(images, samples, range(count))
        taken.append(1000 * (time.perf_counter() - start))
    return taken


def _images(manifest: Manifest, count: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, *manifest.image_size, 3), np.uint8)


def _error(logits: FloatArray, reference: FloatArray) -> float:
    return float(np.linalg.norm(logits - reference) / max(float(np.linalg.norm(reference)), 1e-12))
