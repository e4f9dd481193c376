"""From a recipe and its models to a bundle: trace every stage, compare it with its reference, and only then write."""

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
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
from mlvgm.files import scratch
from mlvgm.purifier import Purifier
from mlvgm.recipe import Recipe

_ROWS = 8  # compared at least


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
        progress: called with one line of text before each step.
        with_programs: also write every stage as an exported program of PyTorch, compared like the graphs.
        keep_engines: keep the engines of the bundle that is replaced; a later build reuses those that still fit.

    Raises:
        ExportError: the models do not fit the recipe, or ``out`` holds something else.
        TraceError: a stage cannot be traced.
        ParityError: a stage is further from its reference than its precision allows. Nothing is written then.
    """
    _check_fit(recipe, purifier, out)
    if with_programs and isinstance(classifier, Path | OnnxClassifier):
        file = classifier if isinstance(classifier, Path) else classifier.file
        raise ExportError(f"{file}: a classifier in ONNX cannot become a program of PyTorch, nor of Torch-TensorRT")
    if isinstance(classifier, Path):
        classifier = OnnxClassifier(classifier, recipe.classifier, recipe.image_size, len(recipe.classes))
    stages = (
        *families.stages(purifier, recipe.blur, recipe.input_noise_l2, families.kept_by(recipe.effective_alphas())),
        classify.stage(classifier, recipe.image_size, len(recipe.classes), progress),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch(out.parent) as work:
        # Rounded weights are a part of what is compared.
        rounded = [replace(stage, tolerance=max(stage.tolerance, LIMITS[recipe.weights])) for stage in stages]
        draft = _Draft(recipe, tuple(rounded), work / "new", progress)
        draft.folder.mkdir()
        report = draft.write_fp16() if recipe.precision == "fp16" else draft.write_fp32()
        runtime = draft.runtime()
        if with_programs:
            report["parity_torch"] = draft.write_programs(report["parity"].get("fp32_stages", ()))
        if draft.fp32_weights:
            report["parity"]["fp32_weights"] = draft.fp32_weights
        if keep_engines and out.exists():
            _keep_engines(out / engine_store.FOLDER, draft.folder / engine_store.FOLDER)
        written = draft.manifest(purifier, runtime, report).write(draft.folder)
        if out.exists():
            out.rename(work / "old")
        draft.folder.rename(out)
    return written


@dataclass(frozen=True)
class _Draft:
    """A bundle in a temporary folder, until all of it is written and compared."""

    recipe: Recipe
    stages: tuple[Stage, ...]
    folder: Path
    progress: Callable[[str], None]
    fp32_weights: dict[str, dict[str, str]] = field(default_factory=dict)

    def write_fp32(self) -> dict[str, Any]:
        """Trace all stages, and compare the graphs; for bf16 also what OpenVINO, if installed, computes of them."""
        for stage in self.stages:
            self._trace(stage, self._file(stage))
        report = {"parity": self._compare("fp32")}
        if self.recipe.precision == "bf16" and "openvino" in runtimes.installed():
            report["parity_bf16"] = self._compare("bf16", "openvino", largest=2)
        return report

    def write_fp16(self) -> dict[str, Any]:
        """Trace in fp16, and in fp32 each stage that has no fp16 form or whose fp16 form is over the error limit.

        The parity report lists the latter as ``fp32_stages``, with the reason. The others are traced in fp32 as well,
        as fallbacks for images on which fp16 overflows.
        """
        in_fp32 = {}
        for stage in self.stages:
            try:
                self._trace(to_fp16(stage), self._file(stage))
            except TraceError as error:
                in_fp32[stage.name] = str(error)
                self._trace(stage, self._file(stage))
        stages = {stage.name: stage for stage in self.stages}
        for c in self._run("fp16", largest=2):
            if c.stage in stages.keys() - in_fp32.keys() and c.relative_error > c.limit:
                in_fp32[c.stage] = f"{c.output} is {c.relative_error:.1e} off its reference in fp16"
                self.progress(f"{c.stage} stays in fp32: {in_fp32[c.stage]}")
                self._trace(stages[c.stage], self._file(stages[c.stage]))
        report = self._compare("fp16")
        for stage in self.stages:
            if stage.name not in in_fp32 and not stage.is_graph:
                self._trace(stage, self._fallback(stage))
        fallback = self._compare("fp32", fallback=True)
        return {"parity": {**report, "fp32_stages": in_fp32}, "parity_fallback": fallback}

    def write_programs(self, in_fp32: Collection[str]) -> dict[str, Any]:
        """Write the program of each graph and fallback, in its precision, and compare those of the graphs."""
        fp16 = self.recipe.precision == "fp16"
        for stage in self.stages:
            self.progress(f"writing the program of {stage.name}")
            programs.write(to_fp16(stage) if fp16 and stage.name not in in_fp32 else stage, self._file(stage))
            if self._fallback(stage).is_file():
                programs.write(stage, self._fallback(stage))
            memory.release()
        return self._compare("fp16" if fp16 else "fp32", "torch")

    def runtime(self) -> str:
        """The recipe's runtime, or "onnxruntime" where "auto" would choose a runtime that cannot run the stages.

        Raises:
            ExportError: the recipe names a CPU runtime that cannot run them.
        """
        recipe = self.recipe
        name = runtimes.choose("auto") if recipe.runtime == "auto" else recipe.runtime
        if name not in runtimes.ON_CPU or name == "onnxruntime" or (recipe.precision, name) == ("bf16", "openvino"):
            return recipe.runtime
        try:
            self._compare(recipe.precision, name, largest=2)
        except (EngineError, compare.ParityError) as error:
            reason = f"{name} cannot serve these models ({' '.join(str(error).split())[:300]})"
            if recipe.runtime != "auto":
                raise ExportError(f"recipe {recipe.name}: {reason}") from None
            self.progress(f"{reason}: the bundle is for onnxruntime")
            return "onnxruntime"
        return recipe.runtime

    def manifest(self, purifier: Purifier, runtime: str, report: dict[str, Any]) -> manifest.Manifest:
        """The bundle's manifest, without digests."""
        recipe = self.recipe
        packages = {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript")}
        versions = {"python": platform.python_version(), "packages": packages}
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
            stages=tuple(
                manifest.StageSpec(
                    stage.name,
                    self._file(stage).name,
                    stage.inputs,
                    stage.outputs,
                    self._fallback(stage).name if self._fallback(stage).is_file() else "",
                )
                for stage in self.stages
            ),
            input_noise_l2=recipe.input_noise_l2,
            precision=recipe.precision,
            weights=recipe.weights,
            runtime=runtime,
            report=report,
            source={"recipe": recipe.name, "blur": recipe.blur, **versions},
        )

    def _file(self, stage: Stage) -> Path:
        return self.folder / f"{stage.name}.onnx"

    def _fallback(self, stage: Stage) -> Path:
        """Where the fp32 graph of a stage in fp16 lies."""
        return self.folder / f"{stage.name}.fp32.onnx"

    def _trace(self, stage: Stage, file: Path) -> None:
        begun = time.monotonic()
        self.progress(f"tracing {stage.name}")
        if kept := trace(stage, file, self.recipe.weights):
            self.fp32_weights[file.stem] = kept
        memory.release()
        self.progress(f"traced {stage.name} in {time.monotonic() - begun:.0f} s")

    def _run(
        self, precision: str, runtime: str = "onnxruntime", largest: int = 0, fallback: bool = False
    ) -> list[compare.Comparison]:
        """Compare the graphs with the references.

        Args:
            largest: batch size; 0 for all that the recipe has.
            fallback: of stages in fp16, compare the fp32 graph.
        """
        # Where a CPU gets fewer rows than a GPU, it has no memory for all of them here either.
        batch = self.recipe.batch
        largest = min(batch.max, largest or (max(batch.cpu, _ROWS) if batch.cpu else batch.max))
        batches = sorted({rows for rows in (1, 2, 3, 5, largest) if rows <= largest})
        files = {stage.name: self._file(stage) for stage in self.stages}
        if fallback:
            files |= {stage.name: file for stage in self.stages if (file := self._fallback(stage)).is_file()}
        return compare.compare_stages(self.stages, files, batches, runtime, self.progress, precision)

    def _compare(
        self, precision: str, runtime: str = "onnxruntime", largest: int = 0, fallback: bool = False
    ) -> dict[str, Any]:
        """As `_run`, for the report.

        Raises:
            ParityError: a stage is too far from its reference.
        """
        limit = max(LIMITS[precision], LIMITS[self.recipe.weights])
        self.progress(f"parity in {precision} with {runtime}: relative error {limit:.0e} at most")
        found = self._run(precision, runtime, largest, fallback)
        compare.check(found)
        return {"runtime": runtime, "precision": precision, "limit": limit, **compare.report(found)}


def _keep_engines(source: Path, target: Path) -> None:
    """As links: until it is replaced, the old bundle is whole."""
    target.mkdir(exist_ok=True)
    for path in source.glob("*"):
        if not (target / path.name).exists():
            try:
                os.link(path, target / path.name)
            except OSError:  # on a file system without links
                shutil.copyfile(path, target / path.name)


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
