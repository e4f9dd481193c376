"""The product on a device, by its runtime "torch": the default model, and an e4e of the published size."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, Case, Measured, compared
from benchmarks.gpu.models import TOY_NVAE, answered, classifier_stage, drawn, purifier_of
from evaluation.photographs import soft_pictures
from export import families
from export.bundle import export_bundle
from export.compare import relative_error
from export.engines import programs
from export.models import load_models
from export.precision import LIMITS, to_fp16
from export.stage import Stage
from export.trace import example
from handlers import runtimes
from handlers.manifest import Batch, Manifest
from handlers.pipeline import Pipeline
from handlers.runtimes import EngineOptions
from handlers.runtimes.device import DeviceArray
from mlvgm.nvae import NVAE, NVAEPurifier
from mlvgm.purifier import Purifier
from mlvgm.recipe import Recipe

_BUNDLE, _E4E, _SAMPLES, _COUNT, _CALLS = "road-signs", "e4e", 8, 64, 16


def export_road_signs(bench: Bench) -> Iterator[Case]:
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
    for precision in ("fp16", "fp32"):
        yield Case(f"{precision} parity", partial(_parity, bench, precision), _COUNT)
        for rows in (_COUNT, 8, 1):
            yield Case(f"{precision} answers", partial(_answers, bench, precision, rows), rows)
        if precision == "fp16":
            yield Case("fp16 memory", partial(_memory, bench))


def e4e(bench: Bench) -> Iterator[Case]:
    """Of the group "e4e product"."""
    for most, rows in ((32, 1), (8, 1), (32, 4), (8, 4)):
        yield Case(f"answers by {most}", partial(_e4e_answers, bench, most, rows), rows)
        if (most, rows) == (8, 1):
            yield from (Case("decode", partial(_e4e_decode, bench, count), count) for count in (32, 8))
            yield Case("labels", partial(_e4e_labels, bench, 32), 32)


def write_e4e(bench: Bench) -> Iterator[Case]:
    """Write the programs of an e4e of the published size, on the CPU."""
    yield Case("write", partial(_write_e4e, bench))


def _write_e4e(bench: Bench) -> Measured:
    """A bundle without graphs: programs are found by a digest, of whatever is in a graph's place."""
    purifier, folder = purifier_of("e4e", torch.device("cpu"), bench.toy), bench.work / _E4E
    folder.mkdir()
    last = classifier_stage(purifier, bench.toy)
    for stage in (*families.stages(purifier, False, 0.0), last):
        file = folder / f"{stage.name}.onnx"
        file.write_text(stage.name)
        programs.write(to_fp16(stage), file)
    drawn("e4e", purifier, last, 32, bench.toy).write(folder)
    return {}


def _e4e_answers(bench: Bench, most: int, rows: int) -> Measured:
    manifest = replace(Manifest.read(bench.work / _E4E), batch=Batch(1, most, most)).write(bench.work / _E4E)
    with Pipeline.load(bench.work / _E4E, "torch") as pipeline:
        return answered(bench, pipeline, rows, manifest.samples.max)


def _e4e_decode(bench: Bench, rows: int) -> Measured:
    """Against the published operators on the same device; "mixed" is the one input."""
    stage = _decoder(_e4e_purifier(bench))
    mixed = example(stage.inputs[0], rows).to(bench.device)
    expected = _published(stage, mixed)
    with _e4e_engine(bench, rows) as decode:
        row = bench.clock(lambda _: decode(mixed), rows)
        return row | compared([decode(mixed)], [expected], LIMITS["fp16"])


def _e4e_labels(bench: Bench, rows: int) -> Measured:
    """How many labels are equal behind this decoder and behind the published one. The classifier is a drawn one too;
    its mean answer is taken off, or it would name one class for all images.
    """
    purifier, logits = _e4e_purifier(bench), [list[Tensor](), list[Tensor]()]
    stage, classifier = _decoder(purifier), classifier_stage(purifier, bench.toy).module().to(bench.device)  # type: ignore[union-attr]
    with _e4e_engine(bench, rows) as decode, torch.no_grad():
        for seed in range(1 if bench.toy else _CALLS):
            mixed = example(stage.inputs[0], rows, seed).to(bench.device)
            for images, found in zip((decode(mixed), _published(stage, mixed)), logits, strict=True):
                found.append(classifier(images.float()))
    ours, theirs = map(torch.cat, logits)
    labels, expected = ((found - theirs.mean(dim=0)).argmax(dim=1) for found in (ours, theirs))
    equal = float((labels == expected).float().mean())
    return {"facts": {"equal labels": equal, "images": len(labels), "classes": len(expected.unique())}}


def _e4e_purifier(bench: Bench) -> Purifier:
    return purifier_of("e4e", torch.device("cpu"), bench.toy).to(bench.device)


def _decoder(purifier: Purifier) -> Stage:
    return families.stages(purifier, False, 0.0)[-1]


def _published(stage: Stage, mixed: Tensor) -> Tensor:
    return torch.cat([stage.reference(part) for part in mixed.split(4)])  # type: ignore[misc]


@contextmanager
def _e4e_engine(bench: Bench, rows: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """The decoder as it is served, for calls of ``rows``."""
    options = EngineOptions(precision="fp16", compiled=(rows,))
    engine = runtimes.load("torch", bench.work / _E4E / "decode.onnx", options)

    def decode(mixed: Tensor) -> Tensor:
        found = engine.run({"mixed": mixed.numpy() if bench.toy else DeviceArray(mixed)})["images"]
        return found.tensor if isinstance(found, DeviceArray) else torch.from_numpy(found)

    try:
        yield decode
    finally:
        engine.close()


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
            found = pipeline.run(soft_pictures(_COUNT, pipeline.manifest.image_size), _SAMPLES, range(_COUNT))
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
    """What closed pipelines leave, in bytes: the first one also what libraries keep for the next, as cuBLAS does."""

    def allocated() -> int:
        gc.collect()
        return 0 if bench.toy else torch.cuda.memory_allocated(bench.device)

    left = [allocated()]
    for _ in range(3):
        with Pipeline.load(bench.work / _BUNDLE, "torch") as pipeline:
            pipeline.run(soft_pictures(_COUNT, pipeline.manifest.image_size), _SAMPLES)
            held = allocated()
        del pipeline
        left.append(allocated())
    if left[-1] - left[1] > 0.05 * (held - left[-1]):
        raise ValueError(f"of {held} bytes, these are still held each time: {left}")
    return {"facts": {"held": held, "left": left}}
