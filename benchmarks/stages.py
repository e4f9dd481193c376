"""Benchmark the pipeline by technique: published operators in eager PyTorch, rewritten, and exported to each runtime.

Every technique runs in its own process, so that memory and threads are its own, on the same images and noise. Ratios
are to the published operators in eager fp32, in the same run.
"""

import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deploy.errors import CliError
from evaluation import report
from export import classifier as classify
from export import families
from export.compare import ReferenceEngine, relative_error
from export.models import load_models
from export.stage import Stage
from handlers import cores, runtimes
from handlers.arrays import FloatArray, IntArray, Pixels
from handlers.inputs import PipelineInputs
from handlers.manifest import FILE_NAME, Batch, Manifest
from handlers.pipeline import Pipeline
from handlers.result import Result
from mlvgm.files import scratch
from mlvgm.recipe import Recipe

PUBLISHED, REWRITTEN, EXPORTED = "published operators", "rewritten", "exported"

_KILLED = "its process was ended by the system, as when memory runs out"
_LONG = 60.0  # seconds: a call that takes longer is not repeated


@dataclass(frozen=True)
class Technique:
    """One way to run a pipeline; ``runtime`` is "eager" for PyTorch, or one of `handlers.runtimes`."""

    name: str
    runtime: str
    precision: str = "fp32"


@dataclass(frozen=True)
class ModelUnderTest:
    """What is measured: a recipe, its bundle, and checkpoints if the recipe has none."""

    recipe: str
    bundle: Path
    purifier: Path | None = None
    classifier: Path | None = None


@dataclass(frozen=True)
class Load:
    """Images per call, purified samples per image, and number of purified images to compare (at least one call's).

    An image's noise does not depend on the call, so loads with the same number of samples can be compared.
    """

    batch: int
    samples: int
    compared: int


@dataclass(frozen=True)
class Measured:
    """One technique under one load.

    Attributes:
        seconds: median time of a call.
        stage_ms: median time by stage.
        memory_mb: peak memory of the process so far, in 10^6 bytes.
        gflops: 10^9 floating-point operations per image with all its samples; None if not counted.
        purified, labels: of all compared images and samples.
    """

    seconds: float
    stage_ms: dict[str, float]
    memory_mb: float
    gflops: float | None
    purified: FloatArray
    labels: IntArray


def techniques() -> list[Technique]:
    """The techniques that this machine can run, from the published operators to the fastest."""
    found = [Technique(PUBLISHED, "eager"), Technique(REWRITTEN, "eager")]
    usable = runtimes.installed() if torch.cuda.is_available() else runtimes.ON_CPU
    found += [Technique(EXPORTED, name) for name in runtimes.installed() if name in usable]
    if "openvino" in runtimes.installed() and _has_bf16():
        found.append(Technique(EXPORTED, "openvino", "bf16"))
    return found


def measure(
    model: ModelUnderTest,
    images: Pixels,
    loads: Sequence[Load],
    seconds: float = 10.0,
    threads: int = 0,
    chosen: Sequence[Technique] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """One row per technique and load, the published operators first.

    Args:
        images: uint8 (N, H, W, 3), at least as many as the largest batch.
        seconds: minimum time to measure each row, in at least two calls, or one if it takes a minute.
        threads: CPU threads; 0 for every core.

    Returns:
        Rows with ``recipe``, ``technique``, ``runtime``, ``precision``, ``batch``, ``samples``, ``images_per_s``,
        ``ratio``, ``stage_ms``, ``memory_mb``, ``gflops``, ``share_of_peak``, ``relative_error``, ``label_agreement``,
        ``compared`` (purified images behind the last two).

    Raises:
        CliError: the published operators need more memory than there is.
    """
    rows: list[dict[str, Any]] = []
    baseline: list[Measured] = []
    first = {load.samples: i for i, load in reversed(list(enumerate(loads)))}
    # All images are compared only once per number of samples: the published operators take seconds per image.
    loads = [
        load if i == first[load.samples] else replace(load, compared=min(load.compared, 8))
        for i, load in enumerate(loads)
    ]
    counted: dict[tuple[str, int], float | None] = {}
    for technique in chosen or techniques():
        say(f"{model.recipe}: {technique.name}, {technique.runtime}, {technique.precision}")
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                peak, results = pool.submit(_run, model, technique, images, loads, seconds, threads).result()
        except (runtimes.EngineError, runtimes.RuntimeMissing) as error:
            say(f"  not measured: {error}")
            continue
        except BrokenProcessPool:
            if not baseline:
                raise CliError(f"{technique.name}: {_KILLED}, so there is nothing to compare with") from None
            say(f"  not measured: {_KILLED}")
            continue
        baseline = baseline or results
        for load, result, reference in zip(loads, results, baseline, strict=True):
            # An exported stage has the operations of its module, which PyTorch counts.
            kind = PUBLISHED if technique.name == PUBLISHED else REWRITTEN
            gflops = counted.setdefault((kind, load.samples), result.gflops)
            row = _row(load, replace(result, gflops=gflops), reference, baseline[first[load.samples]], peak)
            say(
                f"  batch {load.batch}, {load.samples} samples: {row['images_per_s']:.3g} images/s, "
                f"{row['ratio']:.1f}x, error {row['relative_error']:.1e}"
            )
            named = {"recipe": model.recipe, "technique": technique.name}
            rows.append({**named, "runtime": technique.runtime, "precision": technique.precision, **row})
    return rows


def _row(load: Load, result: Measured, reference: Measured, whole: Measured, peak: float) -> dict[str, Any]:
    """What `measure` says of a technique's ``result``.

    Args:
        reference: the published operators under this load.
        whole: those under the load with as many samples that purified all images.
        peak: of the machine, in GFLOP/s.
    """
    per_second, compared = load.batch / result.seconds, min(len(result.labels), len(whole.labels))
    return {
        "batch": load.batch,
        "samples": load.samples,
        "images_per_s": per_second,
        "ratio": reference.seconds / result.seconds,
        "stage_ms": result.stage_ms,
        "memory_mb": result.memory_mb,
        "gflops": result.gflops,
        "share_of_peak": result.gflops * per_second / peak if result.gflops else None,
        "relative_error": relative_error(result.purified[:compared], whole.purified[:compared]),
        "label_agreement": float(np.mean(result.labels[:compared] == whole.labels[:compared])),
        "compared": compared,
    }


def matmul_gflops(precision: str) -> float:
    """The machine's peak in GFLOP/s: the best of eight square matrix products."""
    size = 2048
    matrix = torch.randn(size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    times = []
    for _ in range(8):
        begun = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / min(times) / 1e9


def _run(
    model: ModelUnderTest,
    technique: Technique,
    images: Pixels,
    loads: Sequence[Load],
    seconds: float,
    threads: int,
) -> tuple[float, list[Measured]]:
    torch.set_num_threads(threads or cores.usable())
    if technique.runtime == "eager":
        eager = _Eager(model, technique.name == REWRITTEN)
        results = [_measure(eager.pipeline(load.batch), images, load, seconds, eager.gflops) for load in loads]
    else:
        with (
            scratch(model.bundle.parent) as folder,
            Pipeline.load(_in_precision(model.bundle, technique.precision, folder), technique.runtime, threads)
            as pipeline,
        ):  # fmt: skip
            results = [_measure(pipeline, images, load, seconds) for load in loads]
    return matmul_gflops(technique.precision), results


def _served(pipeline: Pipeline, inputs: PipelineInputs) -> Result:
    return pipeline.run(inputs.images, samples=inputs.samples, seeds=inputs.seeds)


def _measure(
    pipeline: Pipeline,
    images: Pixels,
    load: Load,
    seconds: float,
    count: Callable[[Pipeline, PipelineInputs], float | None] | None = None,
) -> Measured:
    purified, labels, stage_ms = [], [], []
    times: list[float] = []
    calls = [
        PipelineInputs.of(
            pipeline.manifest, images[start : start + load.batch], load.samples, range(start, start + load.batch)
        )
        for start in range(0, max(load.compared // load.batch // load.samples, 1) * load.batch, load.batch)
    ]
    counted = count(pipeline, calls[0]) if count else None
    gflops = counted / load.batch if counted else None
    if count is None:  # counting is a warm-up, too
        _served(pipeline, calls[0])
    begun = time.perf_counter()
    while len(times) < len(calls) or (len(times) < 2 and times[0] < _LONG) or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        result = _served(pipeline, calls[len(times) % len(calls)])
        times.append(time.perf_counter() - started)
        stage_ms.append(result.timing_ms)
        if len(times) <= len(calls):
            purified.append(result.purified.reshape(-1, *result.purified.shape[2:]))
            labels.append(result.sample_labels.ravel())
    return Measured(
        statistics.median(times),
        {name: statistics.median(call[name] for call in stage_ms) for name in stage_ms[0]},
        _peak_mb(),
        gflops,
        np.concatenate(purified),
        np.concatenate(labels),
    )


class _Eager:
    """Pipelines of stages in eager PyTorch: of the published operators, or of the modules that are exported."""

    def __init__(self, model: ModelUnderTest, rewritten: bool) -> None:
        recipe = Recipe.read(model.recipe)
        purifier, classifier = load_models(recipe, model.purifier, model.classifier)
        self._manifest = Manifest.read(model.bundle)
        kept = families.kept(self._manifest.stages)
        purifies = families.stages(purifier, recipe.blur, recipe.input_noise_l2, kept)
        stages = (*purifies, classify.stage(classifier, recipe.image_size, len(recipe.classes)))
        self._engines = {
            stage.name: ReferenceEngine(stage, _rewritten(stage) if rewritten else stage.reference) for stage in stages
        }
        self._counts = not any(stage.is_graph for stage in stages)  # PyTorch cannot count what ONNX Runtime computes

    def pipeline(self, batch: int) -> Pipeline:
        """A pipeline with a maximum batch size: with larger ones, the published operators run out of memory."""
        return Pipeline(replace(self._manifest, batch=Batch(1, batch, batch)), self._engines, "eager")

    def gflops(self, pipeline: Pipeline, inputs: PipelineInputs) -> float | None:
        """10^9 floating-point operations for ``inputs``; a multiply-add counts as two."""
        with FlopCounterMode(display=False) as counter:
            _served(pipeline, inputs)
        return counter.get_total_flops() / 1e9 if self._counts else None


def _rewritten(stage: Stage) -> Callable[..., Any]:
    module = stage.module()
    return module.eval() if isinstance(module, nn.Module) else stage.reference  # ONNX graphs are not rewritten


def _in_precision(bundle: Path, precision: str, folder: Path) -> Path:
    """``bundle``, or a bundle in ``folder`` with the same graphs that declares another precision."""
    manifest = Manifest.read(bundle)
    if manifest.precision == precision:
        return bundle
    for file in bundle.iterdir():
        if file.name != FILE_NAME:
            os.link(file, folder / file.name)
    replace(manifest, precision=precision).write(folder)
    return folder


def _has_bf16() -> bool:
    import openvino as ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _peak_mb() -> float:
    """Peak memory of this process in 10^6 bytes; unlike ru_maxrss, not that of its parent when it was started."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def markdown(content: Mapping[str, Any]) -> str:
    """The rows as a table, with the conditions of the measurement."""
    head = ["recipe", "technique", "runtime", "precision", "batch", "samples", "images/s", "ratio", "ms by stage"]
    head += ["memory, MB", "GFLOP per image", "share of peak", "relative error", "equal labels"]
    lines = [f"{report.conditions(content)}.", ""]
    lines += ["Ratios are to the published operators in eager fp32, in the same run. " + content["weights"], ""]
    table = []
    for row in content["rows"]:
        stages = ", ".join(f"{name} {ms:.0f}" for name, ms in row["stage_ms"].items() if ms >= 0.5)
        cells = [row["recipe"], row["technique"], row["runtime"], row["precision"], row["batch"], row["samples"]]
        cells += [f"{row['images_per_s']:.3g}", f"{row['ratio']:.1f}", stages, f"{row['memory_mb']:.0f}"]
        cells += ["" if row["gflops"] is None else f"{row['gflops']:.4g}"]
        cells += ["" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"]
        cells += [f"{row['relative_error']:.1e}", f"{row['label_agreement']:.1%} of {row['compared']}"]
        table.append(cells)
    return "\n".join([*lines, *report.table(head, table), ""])


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """One bar chart per recipe and load: images per second of each technique, with its ratio."""
    groups: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["batch"], row["samples"]), []).append(row)
    columns = min(len(groups), 3)
    lines = math.ceil(len(groups) / columns)
    figure = report.figure(5 * columns, 0.6 + 2.2 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, ((recipe, batch, samples), chosen) in zip(axes, groups.items(), strict=False):
        names = [f"{row['technique']}\n{row['runtime']}, {row['precision']}" for row in chosen]
        bars = panel.barh(names, [row["images_per_s"] for row in chosen], color="#4878a8")
        panel.bar_label(bars, [f"{row['ratio']:.1f}x" for row in chosen], padding=3)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_title(f"{recipe}, batch {batch}, {samples} {'sample' if samples == 1 else 'samples'}")
        panel.set_xlabel("images per second")
    for panel in axes[len(groups) :]:
        panel.set_visible(False)
    figure.savefig(file)
