"""From a recipe and its models to a bundle: trace every stage, compare it with its reference, and only then write."""

import importlib.metadata
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from export import classifier as classify
from export import compare, families, memory
from export.engines import programs
from export.onnx_classifier import OnnxClassifier
from export.precision import LIMITS, to_fp16
from export.stage import Stage
from export.trace import TraceError, trace
from handlers import manifest, runtimes
from handlers.errors import MlvgmError
from handlers.runtimes import EngineError, engine_store
from mlvgm.purifier import Purifier
from mlvgm.recipe import Recipe


class ExportError(MlvgmError):
    """A bundle cannot be made of these models."""


def export_bundle(
    recipe: Recipe,
    purifier: Purifier,
    classifier: nn.Module | Path,
    out: Path,
    progress: Callable[[str], None] = lambda _: None,
    with_programs: bool = False,
    keep_engines: bool = False,
) -> manifest.Manifest:
    """Write the bundle of ``recipe`` to the folder ``out``, which is replaced where it is a bundle already.

    Args:
        classifier: a module that takes images in [0, 1], or an ONNX file that takes normalised ones.
        progress: is told in one line what comes next.
        with_programs: also write every stage as a program of PyTorch, compared like the graphs.
        keep_engines: keep what was built for the bundle that is replaced: those who build anew know what still fits.

    Raises:
        ExportError: the models do not fit the recipe, or ``out`` holds something else.
        TraceError: a stage cannot be traced.
        ParityError: a stage is further from its reference than its precision allows; nothing is written then.
    """
    _check_fit(recipe, purifier, out)
    if with_programs and isinstance(classifier, Path | OnnxClassifier):
        file = classifier if isinstance(classifier, Path) else classifier.file
        raise ExportError(f"{file}: a classifier in ONNX cannot become a program of PyTorch, nor of Torch-TensorRT")
    if isinstance(classifier, Path):
        classifier = OnnxClassifier(classifier, recipe.classifier, recipe.image_size, len(recipe.classes))
    stages = (
        *families.stages(purifier, recipe.blur, recipe.input_noise_l2),
        classify.stage(classifier, recipe.image_size, len(recipe.classes), progress),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as draft_name:
        draft = Path(draft_name) / out.name
        draft.mkdir()
        files = {stage.name: draft / f"{stage.name}.onnx" for stage in stages}
        if recipe.precision == "fp16":
            report = _write_half(stages, files, recipe.batch.max, progress)
        else:
            report = _write(stages, files, recipe, progress)
        runtime = _served_by(stages, files, recipe, progress)
        if with_programs:
            report["parity_torch"] = _write_programs(stages, files, recipe, report, progress)
        if keep_engines and out.exists():
            _move_engines(out / engine_store.FOLDER, draft / engine_store.FOLDER)
        written = _manifest(recipe, purifier, stages, runtime, report, draft).write(draft)
        if out.exists():
            shutil.rmtree(out)
        draft.rename(out)
    return written


def _write(
    stages: Sequence[Stage], files: Mapping[str, Path], recipe: Recipe, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Trace in fp32; the report has the graphs as they are and, for bf16, as OpenVINO computes them if it is there."""
    for stage in stages:
        _trace(stage, files[stage.name], progress)
    batches = _batches(recipe.batch.max)
    report = {"parity": _compare(stages, files, batches, "fp32", "onnxruntime", progress)}
    if recipe.precision == "bf16" and "openvino" in runtimes.installed():
        report["parity_bf16"] = _compare(stages, files, batches[:2], "bf16", "openvino", progress)
    return report


def _write_half(
    stages: Sequence[Stage], files: Mapping[str, Path], largest: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Trace in fp16, but in fp32 what cannot be halved or, on drawn images, is too far from its reference then.

    The parity report has those stages as ``fp32_stages``, each with the reason. The others are traced in fp32 as well:
    their fallbacks, for images on which half precision overflows.
    """
    single = {}
    for stage in stages:
        try:
            _trace(to_fp16(stage), files[stage.name], progress)
        except TraceError as error:
            single[stage.name] = str(error)
            _trace(stage, files[stage.name], progress)
    drawn = compare.compare_stages(stages, files, _batches(min(largest, 2)), progress=progress, precision="fp16")
    for c in drawn:
        if c.stage != compare.END_TO_END and c.stage not in single and c.relative_error > c.limit:
            single[c.stage] = f"{c.output} is {c.relative_error:.1e} off its reference in fp16"
            progress(f"{c.stage} stays in fp32: {single[c.stage]}")
            _trace(next(stage for stage in stages if stage.name == c.stage), files[c.stage], progress)
    report = _compare(stages, files, _batches(largest), "fp16", "onnxruntime", progress)
    fallbacks = dict(files)
    for stage in stages:
        if stage.name not in single and not stage.is_graph:
            fallbacks[stage.name] = _fallback(files[stage.name])
            _trace(stage, fallbacks[stage.name], progress)
    in_single = _compare(stages, fallbacks, _batches(largest), "fp32", "onnxruntime", progress)
    return {"parity": {**report, "fp32_stages": single}, "parity_fallback": in_single}


def _write_programs(
    stages: Sequence[Stage],
    files: Mapping[str, Path],
    recipe: Recipe,
    report: Mapping[str, Any],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Write the programs, in the precision that each graph has, and compare them with the references."""
    for stage in stages:
        progress(f"writing the program of {stage.name}")
        in_single = recipe.precision != "fp16" or stage.name in report["parity"]["fp32_stages"]
        programs.write(stage if in_single else to_fp16(stage), files[stage.name])
        memory.release()
    precision = "fp16" if recipe.precision == "fp16" else "fp32"
    return _compare(stages, files, _batches(recipe.batch.max), precision, "torch", progress)


def _move_engines(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in source.glob("*"):
        if not (target / path.name).exists():
            path.rename(target / path.name)


def _fallback(file: Path) -> Path:
    """Where the fp32 graph of a stage in half precision lies."""
    return file.with_suffix(".fp32.onnx")


def _trace(stage: Stage, file: Path, progress: Callable[[str], None]) -> None:
    begun = time.monotonic()
    progress(f"tracing {stage.name}")
    trace(stage, file)
    memory.release()
    progress(f"traced {stage.name} in {time.monotonic() - begun:.0f} s")


def _batches(largest: int) -> list[int]:
    return sorted({b for b in (1, 2, 3, 5, largest) if b <= largest})


def _compare(
    stages: Sequence[Stage],
    files: Mapping[str, Path],
    batches: Sequence[int],
    precision: str,
    runtime: str,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    progress(f"parity in {precision} with {runtime}: relative error {LIMITS[precision]:.0e} at most")
    found = compare.compare_stages(stages, files, batches, runtime, progress, precision)
    compare.check(found)
    return {"runtime": runtime, "precision": precision, "limit": LIMITS[precision], **compare.report(found)}


def _served_by(
    stages: Sequence[Stage], files: Mapping[str, Path], recipe: Recipe, progress: Callable[[str], None]
) -> str:
    """The bundle's runtime: the recipe's, or "onnxruntime" where "auto" would choose one that cannot run these stages.

    Raises:
        ExportError: the recipe names a runtime for CPUs that cannot.
    """
    name = runtimes.choose("auto") if recipe.runtime == "auto" else recipe.runtime
    if name not in runtimes.ON_CPU or name == "onnxruntime" or (recipe.precision, name) == ("bf16", "openvino"):
        return recipe.runtime
    try:
        _compare(stages, files, _batches(min(recipe.batch.max, 2)), recipe.precision, name, progress)
    except (EngineError, compare.ParityError) as error:
        reason = f"{name} cannot serve these models ({' '.join(str(error).split())[:300]})"
        if recipe.runtime != "auto":
            raise ExportError(f"recipe {recipe.name}: {reason}") from None
        progress(f"{reason}: the bundle is for onnxruntime")
        return "onnxruntime"
    return recipe.runtime


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
    recipe: Recipe, purifier: Purifier, stages: tuple[Stage, ...], runtime: str, report: dict[str, Any], draft: Path
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
        samples=recipe.samples,
        classes=recipe.classes,
        batch=recipe.batch,
        stages=tuple(_stage(stage, draft) for stage in stages),
        input_noise_l2=recipe.input_noise_l2,
        precision=recipe.precision,
        runtime=runtime,
        report=report,
        source={"recipe": recipe.name, "blur": recipe.blur, "python": platform.python_version(), "packages": packages},
    )


def _stage(stage: Stage, draft: Path) -> manifest.StageSpec:
    file = draft / f"{stage.name}.onnx"
    fallback = _fallback(file).name if _fallback(file).is_file() else ""
    return manifest.StageSpec(stage.name, file.name, stage.inputs, stage.outputs, fallback)
