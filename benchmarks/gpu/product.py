"""The product on a device: the default model with its programs, in its own pipeline, by the runtime "torch"."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.bench import Bench, Case, Measured
from benchmarks.gpu.models import TOY_NVAE, answered, soft_pictures
from export.bundle import export_bundle
from export.compare import relative_error
from export.models import load_models
from export.precision import LIMITS
from handlers.pipeline import Pipeline
from mlvgm.nvae import NVAE, NVAEPurifier
from mlvgm.recipe import Recipe

_BUNDLE, _SAMPLES, _COUNT = "road-signs", 8, 64


def prepare(bench: Bench) -> Iterator[Case]:
    """Export the default model in half precision, with its fallback in fp32, on the CPU."""

    def export() -> Measured:
        recipe = replace(Recipe.read("road-signs"), precision="fp16")
        if bench.toy:
            torch.manual_seed(0)
            recipe = replace(recipe, image_size=16, n_latents=3, alphas={recipe.schedule: (0.0, 0.3, 0.3)})
            linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, len(recipe.classes)))
            models: Any = NVAEPurifier(NVAE(TOY_NVAE)), linear
        else:
            models = load_models(recipe, None, None)
        purifier, classifier = (model.eval().requires_grad_(False) for model in models)
        export_bundle(recipe, purifier, classifier, bench.work / _BUNDLE, with_programs=True)
        return {}

    yield Case("export", export)


def cases(bench: Bench) -> Iterator[Case]:
    """Of the group "road-signs": in fp16, and in the fp32 of the fallback."""
    for precision in ("fp32", "fp16"):
        yield Case(f"{precision} parity", partial(_parity, bench, precision), _COUNT)
        for rows in (1, 8, _COUNT):
            yield Case(f"{precision} answers", partial(_answers, bench, precision, rows), rows)
    yield Case("fp16 memory", partial(_memory, bench))


@contextmanager
def _loaded(bench: Bench, precision: str, runtime: str) -> Iterator[Pipeline]:
    with Pipeline.load(bench.work / _BUNDLE, runtime) as pipeline:
        chosen = pipeline if precision == "fp16" else pipeline.fallback
        if chosen is None or chosen.runtime != runtime:
            raise ValueError(f"{runtime} has no fallback of its own")
        yield chosen


def _parity(bench: Bench, precision: str) -> Measured:
    """Purified images and votes, against those of the fp32 graphs in ONNX Runtime on the CPU."""
    results = []
    for of, runtime in (("fp32", "onnxruntime"), (precision, "torch")):
        with _loaded(bench, of, runtime) as pipeline:
            found = pipeline.run(soft_pictures(pipeline.manifest, _COUNT), _SAMPLES, range(_COUNT))
            results.append((found.purified, found.votes))
    (expected, their_votes), (purified, votes) = results
    if (error := relative_error(purified, expected)) > LIMITS[precision]:
        raise ValueError(f"relative error {error:.2g}, over {LIMITS[precision]:.0e}")
    equal = float((votes == their_votes).all(axis=1).mean())
    return {"relative_error": error, "limit": LIMITS[precision], "facts": {"equal votes": equal}}


def _answers(bench: Bench, precision: str, rows: int) -> Measured:
    with _loaded(bench, precision, "torch") as pipeline:
        return answered(bench, pipeline, rows, _SAMPLES)


def _memory(bench: Bench) -> Measured:
    """What a closed pipeline leaves, in bytes."""

    def allocated() -> int:
        gc.collect()
        return 0 if bench.toy else torch.cuda.memory_allocated(bench.device)

    before = allocated()
    with Pipeline.load(bench.work / _BUNDLE, "torch") as pipeline:
        pipeline.warm_up()
        held = allocated() - before
    del pipeline
    if (left := allocated() - before) > 0.05 * held:
        raise ValueError(f"{left} of {held} bytes are still held")
    return {"facts": {"held": held, "left": left}}
