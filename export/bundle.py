"""From a recipe and its models to a bundle: trace every stage, compare it with its twin, and only then write."""

import importlib.metadata
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from export import classifier as classify
from export import families, memory, onnx_classifier, parity
from export.precision import LIMITS, in_half
from export.stage import Named, Stage
from export.trace import trace
from handlers import manifest, runtimes
from mlvgm.purifier import Purifier
from mlvgm.recipe import Recipe


class ExportError(RuntimeError):
    """A bundle cannot be made of these models."""


def export_bundle(
    recipe: Recipe,
    purifier: Purifier,
    classifier: nn.Module | Path,
    out: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> manifest.Manifest:
    """Write the bundle of ``recipe`` to the folder ``out``, which is replaced where it is a bundle already.

    Args:
        classifier: a module that takes images in [0, 1], or an ONNX file that takes normalised ones.
        progress: is told in one line what comes next.

    Raises:
        ExportError: the models do not fit the recipe, or ``out`` holds something else.
        TraceError: a stage cannot be traced.
        ParityError: a stage is further from its eager twin than its precision allows; nothing is written then.
    """
    _check_fit(recipe, purifier, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    stages = (
        *families.stages(purifier, recipe.blur, recipe.input_noise_l2),
        _classify(recipe, classifier),
    )
    if recipe.precision == "fp16":
        stages = tuple(in_half(stage) for stage in stages)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as draft_name:
        draft = Path(draft_name) / out.name
        draft.mkdir()
        files = {}
        for stage in stages:
            begun = time.monotonic()
            progress(f"tracing {stage.name}")
            files[stage.name] = draft / f"{stage.name}.onnx"
            trace(stage, files[stage.name])
            memory.release()
            progress(f"traced {stage.name} in {time.monotonic() - begun:.0f} s")
        report = _compare(recipe, stages, files, progress)
        written = _manifest(recipe, purifier, stages, report).write(draft)
        if out.exists():
            shutil.rmtree(out)
        draft.rename(out)
    return written


def _compare(
    recipe: Recipe, stages: tuple[Stage, ...], files: dict[str, Path], progress: Callable[[str], None]
) -> dict[str, Any]:
    """The parity report: the graphs as they are, and for bf16 also as OpenVINO computes them, where it is installed."""
    batches = sorted({b for b in (1, 2, 3, 5, recipe.batch[2]) if b <= recipe.batch[2]})
    graphs = "fp16" if recipe.precision == "fp16" else "fp32"
    runs = {"parity": ("onnxruntime", graphs, batches)}
    if recipe.precision == "bf16" and "openvino" in runtimes.installed():
        runs["parity_bf16"] = ("openvino", "bf16", batches[:2])
    report = {}
    for name, (runtime, precision, sizes) in runs.items():
        progress(f"parity in {precision} with {runtime}: relative error {LIMITS[precision]:.0e} at most")
        found = parity.compare_stages(stages, files, sizes, runtime, progress, precision)
        parity.check(found, LIMITS[precision])
        report[name] = {"runtime": runtime, "precision": precision, **parity.report(found, LIMITS[precision])}
    return report


def _classify(recipe: Recipe, classifier: nn.Module | Path) -> Stage:
    if isinstance(classifier, nn.Module):
        return classify.stage(classifier, recipe.image_size, len(recipe.classes))
    return onnx_classifier.stage(classifier, recipe.classifier, recipe.image_size, len(recipe.classes))


def _check_fit(recipe: Recipe, purifier: Purifier, out: Path) -> None:
    if purifier.image_size != recipe.image_size:
        raise ExportError(
            f"recipe {recipe.name}: images are {recipe.image_size} px, the purifier's {purifier.image_size} px"
        )
    if purifier.n_latents != recipe.n_latents:
        raise ExportError(
            f"recipe {recipe.name}: has {recipe.n_latents} latents, the purifier has {purifier.n_latents}"
        )
    if out.exists() and not (out / manifest.FILE_NAME).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: is there already and is no bundle; give another --out")


def _manifest(
    recipe: Recipe, purifier: Purifier, stages: tuple[Stage, ...], report: dict[str, Any]
) -> manifest.Manifest:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}
    return manifest.Manifest(
        name=recipe.name,
        version="1.0",
        family=recipe.family,
        image_size=(recipe.image_size, recipe.image_size),
        noise_shapes=purifier.noise_shapes,
        alphas={name: tuple(recipe.effective_alphas(name)) for name in recipe.alphas},
        default_alphas=recipe.schedule,
        samples=manifest.Samples(*recipe.samples),
        classes=recipe.classes,
        batch=manifest.Batch(*recipe.batch, recipe.cpu_batch),
        stages=tuple(manifest.Stage(s.name, f"{s.name}.onnx", _tensors(s.inputs), _tensors(s.outputs)) for s in stages),
        input_noise_l2=recipe.input_noise_l2,
        precision=recipe.precision,
        runtime=recipe.runtime,
        report=report,
        source={"recipe": recipe.name, "blur": recipe.blur, "python": platform.python_version(), "packages": packages},
    )


def _tensors(named: tuple[Named, ...]) -> tuple[manifest.Tensor, ...]:
    return tuple(manifest.Tensor(name, "float32", shape) for name, shape in named)
