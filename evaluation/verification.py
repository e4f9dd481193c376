"""Compare a bundle with the reference, the published operators in eager PyTorch: by stage, and from image to vote."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from evaluation import report
from export import families
from export.classifier import stage as classifier_stage
from export.compare import END_TO_END, ReferenceEngine, relative_error, run_engine
from export.stage import Stage
from handlers import runtimes
from handlers.arrays import AnyFloats, Pixels
from handlers.errors import MlvgmError
from handlers.manifest import Batch, Manifest, TensorSpec
from handlers.pipeline import Pipeline
from handlers.result import Result
from handlers.runtimes import Array, Engine
from mlvgm.purifier import Purifier

_FEW = Batch(1, 4, 4)  # rows per call of the reference: the published operators need much memory per row


class VerificationError(MlvgmError):
    """The models are not those that the bundle was made from."""


@dataclass(frozen=True)
class Difference:
    """How far an array is from its reference.

    Attributes:
        relative_l2: ||found - expected|| / ||expected||.
        max, mean, median, q99: of the absolute difference.
        cosine: of the angle between the two.
        psnr: peak signal-to-noise ratio in dB, the peak being the reference's largest magnitude; infinite where
            they agree.
    """

    relative_l2: float
    max: float
    mean: float
    median: float
    q99: float
    cosine: float
    psnr: float


def difference(found: AnyFloats, expected: AnyFloats) -> Difference:
    """Compare two arrays of as many numbers; NaN or infinity anywhere makes ``relative_l2`` infinite."""
    found, expected = np.asarray(found, np.float64).ravel(), np.asarray(expected, np.float64).ravel()
    gap = np.abs(found - expected)
    norms = np.linalg.norm(found) * np.linalg.norm(expected)
    peak, mse = float(np.abs(expected).max()), float(np.mean(gap**2))
    median, q99 = (float(q) for q in np.quantile(gap, (0.5, 0.99)))
    return Difference(
        relative_l2=relative_error(found, expected),
        max=float(gap.max()),
        mean=float(gap.mean()),
        median=median,
        q99=q99,
        cosine=float(found @ expected / norms) if norms > 0 else float(mse == 0),
        psnr=10 * float(np.log10(peak**2 / mse)) if mse > 0 and peak > 0 else float("inf"),
    )


def verify(
    bundle: Path,
    purifier: Purifier,
    classifier: nn.Module,
    sets: Mapping[str, Pixels],
    names: Sequence[str],
    samples: int = 2,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """One row per runtime, set of images, stage and output, and one per runtime and set for the whole pipeline.

    Args:
        sets: uint8 images (B, H, W, 3) by name, such as "clean" and "attacked".
        names: runtimes.
        samples: purified samples per image.

    Returns:
        Rows with ``runtime``, ``images``, ``stage``, ``output`` and the fields of `Difference`. Rows of the whole
        pipeline have the ``stage`` "end to end", ``logits_relative_l2``, and the shares of equal answers
        ``equal_labels`` (of samples) and ``equal_votes`` (of images).

    Raises:
        VerificationError: the purifier does not fit the bundle.
        BundleError, EngineError: the bundle is damaged, or a runtime refuses it.
    """
    manifest = Manifest.read(bundle)
    _check_fit(manifest, purifier)
    blur, kept = bool(manifest.source.get("blur")), families.kept(manifest.stages)
    stages = (
        *families.stages(purifier, blur, manifest.input_noise_l2, kept),
        classifier_stage(classifier, manifest.image_size[0], len(manifest.classes)),
    )
    references = {}
    for images_name, images in sets.items():
        say(f"running the reference on {len(images)} {images_name} images, {samples} samples each")
        recorders = {stage.name: _Recorder(stage) for stage in stages}
        pipeline = Pipeline(replace(manifest, batch=_FEW), recorders, "reference")
        references[images_name] = recorders, pipeline.run(images, samples, range(len(images)))
    rows: list[dict[str, Any]] = []
    for runtime in names:
        say(f"running {runtime}")
        options = runtimes.EngineOptions(precision=manifest.precision)
        for stage in stages:
            file = next(bundle / s.file for s in manifest.stages if s.name == stage.name)
            with closing(runtimes.load(runtime, file, options)) as engine:
                for images_name, (recorders, _) in references.items():
                    where = {"runtime": runtime, "images": images_name, "stage": stage.name}
                    rows += [where | row for row in recorders[stage.name].compare(engine, manifest.batch.opt)]
        with Pipeline.load(bundle, runtime=runtime) as pipeline:
            for images_name, (_, expected) in references.items():
                where = {"runtime": runtime, "images": images_name, "stage": END_TO_END}
                found = pipeline.run(sets[images_name], samples, range(len(sets[images_name])))
                rows.append(where | _compare_results(found, expected))
    return rows


def markdown(rows: Sequence[Mapping[str, Any]], limit: float) -> str:
    """The rows as a table."""
    head = ["runtime", "images", "stage", "output", "relative L2", "max", "cosine", "PSNR, dB"]
    head += ["equal labels", "equal votes"]
    table = []
    for row in rows:
        cells = [row["runtime"], row["images"], row["stage"], row["output"], f"{row['relative_l2']:.1e}"]
        cells += [f"{row['max']:.1e}", f"{row['cosine']:.6f}", f"{row['psnr']:.0f}"]
        cells += [f"{row[key]:.1%}" if key in row else "" for key in ("equal_labels", "equal_votes")]
        table.append(cells)
    return "\n".join([f"The limit of the relative L2 error is {limit:.0e}.", "", *report.table(head, table), ""])


def plot(rows: Sequence[Mapping[str, Any]], limit: float, file: Path) -> None:
    """Relative error of every output, one mark per runtime and set of images."""
    outputs = list(dict.fromkeys(f"{row['stage']}: {row['output']}" for row in rows))
    figure = report.figure(8, 1.5 + 0.3 * len(outputs))
    axes = figure.subplots()
    for runtime, images in dict.fromkeys((row["runtime"], row["images"]) for row in rows):
        chosen = [row for row in rows if (row["runtime"], row["images"]) == (runtime, images)]
        places = [outputs.index(f"{row['stage']}: {row['output']}") for row in chosen]
        errors = [max(row["relative_l2"], 1e-12) for row in chosen]
        axes.plot(errors, places, "o", label=f"{runtime}, {images}", alpha=0.6)
    axes.axvline(limit, color="black", linestyle=":", label="limit")
    axes.set_xscale("log")
    axes.set_yticks(range(len(outputs)), outputs)
    axes.invert_yaxis()
    axes.set_xlabel("relative L2 error")
    axes.legend()
    figure.savefig(file)


def _check_fit(manifest: Manifest, purifier: Purifier) -> None:
    if tuple(purifier.noise_shapes) != tuple(manifest.noise_shapes):
        raise VerificationError(
            f"the bundle {manifest.name} has latents {list(manifest.noise_shapes)}, the purifier "
            f"{list(purifier.noise_shapes)}: these are different models"
        )


class _Recorder(ReferenceEngine):
    """The reference of a stage, which keeps what it was given and what it made of it."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage, stage.reference)
        self.stage = stage
        self._inputs: list[Mapping[str, Array]] = []
        self._outputs: list[Mapping[str, Array]] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = super().run(inputs)
        self._inputs.append(inputs)
        self._outputs.append(outputs)
        return outputs

    def compare(self, engine: Engine, batch: int) -> Iterator[dict[str, Any]]:
        """``engine`` given the same, so that an error is attributed to the right stage: a row per output."""
        found = run_engine(engine, self.stage, _joined(self.stage.inputs, self._inputs), batch)
        for name, expected in _joined(self.stage.outputs, self._outputs).items():
            yield {"output": name, **asdict(difference(found[name], expected))}


def _joined(specs: Sequence[TensorSpec], calls: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
    """The tensors of all calls; those without a batch axis are the same in each."""
    first = calls[0]
    return {s.name: np.concatenate([c[s.name] for c in calls]) if s.batched else first[s.name] for s in specs}


def _compare_results(found: Result, expected: Result) -> dict[str, Any]:
    """The whole pipeline, from images to votes, as it is served."""
    return {
        "output": "purified",
        **asdict(difference(found.purified, expected.purified)),
        "logits_relative_l2": relative_error(found.sample_logits, expected.sample_logits),
        "equal_labels": float(np.mean(found.sample_labels == expected.sample_labels)),
        "equal_votes": float(np.mean(found.labels == expected.labels)),
    }
