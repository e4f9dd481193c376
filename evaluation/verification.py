"""Compare a bundle with the reference, the published operators in eager PyTorch: by stage, and from image to vote."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluation import report
from evaluation.attacks import to_float
from export import families
from export.classifier import stage as classifier_stage
from export.compare import END_TO_END, relative_error, run_engine, run_reference, slice_batch
from export.stage import Stage
from handlers import runtimes
from handlers.errors import MlvgmError
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline
from handlers.runtimes import Engine
from mlvgm.purifier import Purifier

Floats = NDArray[np.floating[Any]]


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


def difference(found: Floats, expected: Floats) -> Difference:
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
    sets: Mapping[str, NDArray[np.uint8]],
    names: Sequence[str],
    samples: int = 2,
    seed: int = 0,
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
    stages = (
        *families.stages(
            purifier, bool(manifest.source.get("blur")), manifest.input_noise_l2, families.kept(manifest.stages)
        ),
        classifier_stage(classifier, manifest.image_size[0], len(manifest.classes)),
    )
    references = {}
    for images_name, images in sets.items():
        say(f"running the reference on {len(images)} {images_name} images, {samples} samples each")
        references[images_name] = _Reference.of(manifest, stages, images, samples, seed)
    rows: list[dict[str, Any]] = []
    for runtime in names:
        say(f"running {runtime}")
        options = runtimes.Options(precision=manifest.precision)
        for stage in stages:
            file = next(bundle / s.file for s in manifest.stages if s.name == stage.name)
            engine = runtimes.load(runtime, file, options)
            try:
                for images_name, reference in references.items():
                    where = {"runtime": runtime, "images": images_name, "stage": stage.name}
                    rows += [where | row for row in _compare_stage(engine, stage, reference, manifest.batch.opt)]
            finally:
                engine.close()
        with Pipeline.load(bundle, runtime=runtime) as pipeline:
            for images_name, reference in references.items():
                where = {"runtime": runtime, "images": images_name, "stage": END_TO_END}
                rows.append(where | _compare_pipeline(pipeline, sets[images_name], samples, reference))
    return rows


@dataclass(frozen=True)
class _Reference:
    """Inputs and outputs of the reference for a set of images, each repeated ``samples`` times.

    Attributes:
        drawn: the noise, by input name.
        inputs, outputs: of each stage, by stage name.
    """

    drawn: dict[str, Tensor]
    inputs: dict[str, dict[str, Tensor]]
    outputs: dict[str, dict[str, Tensor]]

    @classmethod
    def of(
        cls, manifest: Manifest, stages: Sequence[Stage], images: NDArray[np.uint8], samples: int, seed: int
    ) -> "_Reference":
        drawn = _draw(manifest, len(images) * samples, seed)
        known = drawn | {
            "images": to_float(images.repeat(samples, axis=0)),
            "alphas": torch.tensor(manifest.alphas[manifest.default_alphas], dtype=torch.float32),
        }
        inputs, outputs = {}, {}
        for stage in stages:
            inputs[stage.name] = slice_batch(stage, known, slice(None))
            outputs[stage.name] = run_reference(stage, known)
            known |= outputs[stage.name]
        return cls(drawn, inputs, outputs)


def markdown(rows: Sequence[Mapping[str, Any]], limit: float) -> str:
    """The rows as a table."""
    head = [
        "runtime",
        "images",
        "stage",
        "output",
        "relative L2",
        "max",
        "cosine",
        "PSNR, dB",
        "equal labels",
        "equal votes",
    ]
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


def _draw(manifest: Manifest, rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(rows, *shape, generator=generator) for shape in manifest.noise_shapes]
    drawn = {f"noise_{i}": tensor for i, tensor in enumerate(noise)}
    if len(set(manifest.noise_shapes)) == 1:
        drawn["noise"] = torch.stack(noise, dim=1)
    return drawn | {"input_noise": torch.randn(rows, 3, *manifest.image_size, generator=generator)}


def _compare_stage(engine: Engine, stage: Stage, reference: _Reference, batch: int) -> list[dict[str, Any]]:
    """One stage on the outputs of the references before it, so that an error is attributed to the right stage."""
    expected = reference.outputs[stage.name]
    found = run_engine(engine, stage, reference.inputs[stage.name], batch)
    return [{"output": name, **asdict(difference(found[name], tensor.numpy()))} for name, tensor in expected.items()]


def _compare_pipeline(
    pipeline: Pipeline, images: NDArray[np.uint8], samples: int, reference: _Reference
) -> dict[str, Any]:
    """The whole pipeline, from images to votes, as it is served."""
    drawn, stages = reference.drawn, [stage.name for stage in pipeline.manifest.stages]
    noise = [drawn[f"noise_{i}"].numpy() for i in range(pipeline.manifest.n_latents)]
    input_noise = drawn["input_noise"].numpy() if pipeline.manifest.input_noise_l2 else None
    result = pipeline.run(images, samples=samples, noise=noise, input_noise=input_noise)
    purified = reference.inputs[stages[-1]]["images"]
    logits = reference.outputs[stages[-1]]["logits"].numpy().reshape(result.sample_logits.shape)
    expected = replace(result, sample_logits=logits)
    return {
        "output": "purified",
        **asdict(difference(result.purified, purified.numpy())),
        "logits_relative_l2": relative_error(result.sample_logits, logits),
        "equal_labels": float(np.mean(result.sample_labels == expected.sample_labels)),
        "equal_votes": float(np.mean(result.labels == expected.labels)),
    }
