"""Measure the robustness of purification as it is served: 8-bit images in, votes of the samples out.

    python -m evaluation.robustness --bundle build/road-signs --data GTSRB --json benchmarks/results/robustness.json

There are two kinds of attackers. The first knows only the classifier (DeepFool and Carlini-Wagner, as in the paper).
The purifier is compared with the classifier alone, two simple defences, and ablations of itself: nothing resampled, one
sample instead of a vote, and the paper's linear schedule. The second attacker knows the whole defence except its noise.
``--noise-sigma`` also measures Gaussian noise on clean images. Attacked images are kept in build/attacks (``--cache``),
so that it is quick to measure other alphas.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from evaluation import adaptive, defences, report, robustness_report
from evaluation.attacks import METHODS, AttackResult, attack, predict
from evaluation.defences import Defence, Images, Labels, Predictions, share
from evaluation.photographs import read_photographs
from handlers.pipeline import Pipeline
from mlvgm.load import Default, load_default

NOISE_DRAWS, NOISE_SAMPLES = 48, 8
"""For images with Gaussian noise: number of noisy images that vote, and of purified samples of a single noisy image."""

DEVIATION_IMAGES, DEVIATION_SAMPLES = 512, 8
"""Number of clean images, and of purified samples of each, to measure how far samples differ."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BOUNDS = (0.25, 0.5, 1.0, 2.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a summary, and write JSON, a Markdown table and a plot. Returns 0."""
    args = _parser().parse_args(arguments)
    begun = time.monotonic()
    with Pipeline.load(args.bundle, threads=args.threads) as pipeline:
        manifest = pipeline.manifest
        signs = read_photographs(args.data, args.part, manifest.classes, manifest.image_size, args.limit)
        default = load_default(args.recipe or str(manifest.source.get("recipe", "road-signs")))
        served = manifest.samples.default
        samples = args.samples or (served if isinstance(served, int) else manifest.samples.max)
        schedule = args.alphas or manifest.default_alphas
        content: dict[str, Any] = {
            "benchmark": "robustness",
            "model": manifest.name,
            "part": args.part,
            "n": len(signs),
            "samples": samples,
            "schedule": schedule,
            "served": schedule == manifest.default_alphas,
            "alphas": list(manifest.alphas[schedule]),
            "seed": args.seed,
            "noise_l2": defences.NOISE_L2,
            "runtime": pipeline.runtime,
            "precision": manifest.precision,
            "files": {name: seal.sha256 for name, seal in manifest.files.items()},
            **report.measured_here(),
        }
        table = compared(pipeline, samples, args.seed, schedule)
        bare, purifier = table["none"], table["purifier"]
        content |= measure(default.classifier, table, signs.images, signs.labels, args.attacks, args.cache)
        spread = min(DEVIATION_SAMPLES, manifest.samples.max)
        few_images = signs.images[:DEVIATION_IMAGES]
        content["sample_deviation"] = defences.sample_deviation(pipeline, few_images, spread, args.seed, schedule)
        if args.noise_sigma:
            noisy = slice(0, args.noise_images)
            images, labels = signs.images[noisy], signs.labels[noisy]
            content["noise"] = measure_noise(pipeline, images, labels, args.noise_sigma, args.seed, schedule)
        if args.adaptive:
            few = slice(0, args.adaptive)
            whole = Default(default.purifier, default.classifier, content["alphas"], default.recipe)
            content["adaptive"] = measure_adaptive(
                whole,
                bare,
                purifier,
                signs.images[few],
                signs.labels[few],
                args.adaptive_l2,
                args.steps,
                args.gradient_samples,
            )
    content["caveats"] = caveats(content)
    content["seconds"] = round(time.monotonic() - begun, 1)
    page = robustness_report.markdown(content)
    print(page)
    report.save(content, page, args.json, lambda file: robustness_report.plot(content, file))
    return 0


def compared(pipeline: Pipeline, samples: int, seed: int, schedule: str) -> dict[str, Defence]:
    """The defences of the report by name, in its order, for `measure`; "linear" where the bundle has that schedule."""
    nothing = [0.0] * pipeline.manifest.n_latents
    voters = samples if pipeline.manifest.input_noise_l2 else 1  # without any noise all samples are the same
    table = {
        "none": defences.bare(pipeline),
        "blur": defences.blur(pipeline),
        "noise": defences.noise(pipeline, samples, seed),
        "kept": defences.purifier(pipeline, voters, seed, nothing),
        "purifier": defences.purifier(pipeline, samples, seed, schedule),
    }
    if "linear" in pipeline.manifest.alphas:
        table["linear"] = defences.purifier(pipeline, samples, seed, "linear")
    return table


def measure(
    classifier: nn.Module,
    table: Mapping[str, Defence],
    images: Images,
    labels: Labels,
    methods: Sequence[str],
    cache: Path | None = None,
) -> dict[str, Any]:
    """Attack ``classifier`` with each of ``methods``, and evaluate every defence on the attacked images.

    Args:
        table: defences by name: first "none", the classifier alone; "purifier" must be among them. The first sample of
            the purifier is evaluated as another defence, "one".

    Returns:
        "attacks"; "accuracy", defence -> set of images -> share; "within", the same with the clean image instead of
        larger perturbations than a bound; for the purifier "per_sample", "recovered" and "detection".
    """
    sets, attacks, sizes = {"clean": images}, {}, {}
    right = predict(classifier, images) == labels
    for method in methods:
        begun = time.monotonic()
        result = attack(classifier, images, labels, method, cache)
        sets[method], sizes[method] = result.images, result.l2
        attacks[method] = {"seconds": round(time.monotonic() - begun, 1), **_describe(method, result, right)}
    rows: dict[str, dict[str, Predictions]] = {}
    for name, defence in table.items():
        found = {key: defence(attacked) for key, attacked in sets.items()}
        if name == "purifier":
            rows["one"] = {key: _first(found[key], rows["none"][key]) for key in found}
        rows[name] = found
    unpurified, purified = rows["none"], rows["purifier"]
    for method in methods:
        agreeing = unpurified[method].labels == predict(classifier, sets[method])
        attacks[method]["engine_agrees"] = share(agreeing)["share"]
    return {
        "attacks": attacks,
        "accuracy": {
            name: {key: share(found.labels == labels) for key, found in row.items()} for name, row in rows.items()
        },
        "within": {
            method: [
                {
                    "l2": bound,
                    **{name: _within(row, method, sizes[method] <= bound, labels) for name, row in rows.items()},
                }
                for bound in BOUNDS
            ]
            for method in methods
        },
        "per_sample": {key: _per_sample(found, labels) for key, found in purified.items()},
        "recovered": {
            key: share((found.labels == labels)[right & (unpurified[key].labels != labels)])
            for key, found in purified.items()
            if key != "clean"
        },
        "detection": {
            key: {"flagged": share(found.flagged), "agreement": round(float(found.agreement.mean()), 4)}
            for key, found in purified.items()
        },
    }


def measure_noise(
    pipeline: Pipeline, images: Images, labels: Labels, sigmas: Sequence[float], seed: int, schedule: str
) -> dict[str, Any]:
    """Accuracy on clean ``images`` with Gaussian noise of each standard deviation, for pixels in [0, 1].

    Returns:
        "n", "draws", "samples" and "sigmas", one row each: "sigma", and as shares "none", the classifier on one noisy
        image; "purified", "samples" purified samples of that image; "vote", one purified sample of each of "draws"
        noisy images; "vote_none", the classifier on each of these.
    """
    samples = min(NOISE_SAMPLES, pipeline.manifest.samples.max)
    bare, several = defences.bare(pipeline), defences.purifier(pipeline, samples, seed, schedule)
    rows = []
    for sigma in sigmas:
        read, purified = [], []
        for draw in range(NOISE_DRAWS):
            noisy = defences.gaussian(images, sigma, seed + draw)
            once = defences.purifier(pipeline, 1, seed + draw * len(images), schedule)
            read.append(bare(noisy).labels)
            purified.append(once(noisy).labels)
        rows.append(
            {
                "sigma": sigma,
                "none": share(read[0] == labels),
                "purified": share(several(defences.gaussian(images, sigma, seed)).labels == labels),
                "vote": share(defences.vote(np.stack(purified, axis=1)) == labels),
                "vote_none": share(defences.vote(np.stack(read, axis=1)) == labels),
            }
        )
    return {"n": len(images), "draws": NOISE_DRAWS, "samples": samples, "sigmas": rows}


def measure_adaptive(
    default: Default,
    bare: Defence,
    purifier: Defence,
    images: Images,
    labels: Labels,
    bounds: Sequence[float],
    steps: int,
    gradient_samples: int,
) -> dict[str, Any]:
    """Accuracy under projected gradient descent within each of ``bounds``, L2 norms.

    Args:
        gradient_samples: draws of the noise that each gradient through the purifier is averaged over.

    Returns:
        "n", "steps", "samples" and "bounds", one row each: "l2", and as shares "none", the classifier attacked and
        undefended; "transfer", the same images purified; "adaptive", the whole defence attacked and purified.
    """
    rows = []
    for l2 in bounds:
        settings = adaptive.PgdSettings(l2, steps)
        easy = adaptive.attack_within(adaptive.bare(default.classifier), images, labels, settings, f"PGD {l2:g}")
        whole = adaptive.defended(default, gradient_samples, settings.seed)
        hard = adaptive.attack_within(whole, images, labels, settings, f"adaptive PGD {l2:g}")
        rows.append(
            {
                "l2": l2,
                "none": share(bare(easy).labels == labels),
                "transfer": share(purifier(easy).labels == labels),
                "adaptive": share(purifier(hard).labels == labels),
            }
        )
    return {"n": len(images), "steps": steps, "samples": gradient_samples, "bounds": rows}


def caveats(content: Mapping[str, Any]) -> list[str]:
    """Caveats: signs in a report that an attack was too weak, or an engine is wrong; one sentence each."""
    found = []
    attacks = content["attacks"]
    for name, entry in attacks.items():
        if entry["fooled"]["share"] < 0.99:
            found.append(f"{name} fools only {entry['fooled']['share']:.1%}: it is not at its full strength.")
        if entry["engine_agrees"] < 0.995:
            found.append(
                f"Engine and eager classifier agree on only {entry['engine_agrees']:.1%} of the {name} images: "
                "is the bundle made from other weights?"
            )
    if {"deepfool", "cw"} <= attacks.keys() and attacks["cw"]["l2"]["0.5"] > 1.1 * attacks["deepfool"]["l2"]["0.5"]:
        found.append("Carlini-Wagner needs larger changes than DeepFool: it has too few steps.")
    for row in content.get("adaptive", {}).get("bounds", []):
        if row["adaptive"]["share"] > row["transfer"]["share"]:
            found.append(f"At L2 {row['l2']:g} the adaptive attack is weaker than one that knows the classifier alone.")
    return found


def _within(
    predictions: Mapping[str, Predictions], method: str, small: NDArray[np.bool_], labels: Labels
) -> dict[str, Any]:
    """Accuracy against an attacker who sends the clean image if the perturbation is not ``small``."""
    return share(np.where(small, predictions[method].labels, predictions["clean"].labels) == labels)


def _first(found: Predictions, unpurified: Predictions) -> Predictions:
    """The predictions ``found`` with only the first sample of each image."""
    voters = found.sample_labels[:, :1]
    return Predictions(voters[:, 0], voters, voters[:, 0] != unpurified.labels)


def _describe(method: str, result: AttackResult, right: NDArray[np.bool_]) -> dict[str, Any]:
    changed = result.l2[right & result.fooled]
    quantiles = np.quantile(changed, QUANTILES) if len(changed) else np.full(len(QUANTILES), np.nan)
    return {
        "settings": METHODS[method].settings(),
        "fooled": share(result.fooled[right]),
        "l2": {str(q): round(float(value), 4) for q, value in zip(QUANTILES, quantiles, strict=True)},
    }


def _per_sample(found: Predictions, labels: Labels) -> dict[str, Any]:
    """Accuracy of a single sample, and accuracy if one wrong sample makes the answer wrong."""
    right = found.sample_labels == labels[:, None]
    return {"one": round(float(right.mean()), 4), "all": share(right.all(axis=1))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.robustness",
        description="Measure accuracy under attack, as served, beside simple defences.",
        epilog="Example: python -m evaluation.robustness --bundle build/road-signs --data ../gtsrb --limit 500",
    )
    parser.add_argument("--bundle", type=Path, default=Path("build/road-signs"), help="(%(default)s)")
    parser.add_argument("--recipe", help="whose eager models are attacked (default: the one the bundle was made from)")
    parser.add_argument("--data", type=Path, required=True, help="GTSRB, or PART/CLASS/IMAGE")
    parser.add_argument("--part", choices=("test", "validation"), default="test", help="(%(default)s)")
    parser.add_argument("--limit", type=int, help="images to use, the first of a fixed random order (default: all)")
    parser.add_argument("--samples", type=int, help="purified samples that vote (default: the bundle's)")
    parser.add_argument("--alphas", help="schedule of the bundle (default: the bundle's)")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/attacks"), help="folder of the attacked images (%(default)s)"
    )
    parser.add_argument("--attacks", nargs="+", choices=list(METHODS), default=list(METHODS), help="(default: all)")
    parser.add_argument(
        "--adaptive", type=int, default=200, metavar="N", help="images for it, 0 for none (%(default)s)"
    )
    parser.add_argument("--adaptive-l2", type=float, nargs="+", default=[0.5, 1.0], help="(default: 0.5 1.0)")
    parser.add_argument("--steps", type=int, default=20, help="of the adaptive attack (%(default)s)")
    parser.add_argument(
        "--gradient-samples",
        type=int,
        default=4,
        help="draws of the noise to average each gradient of it over (%(default)s)",
    )
    parser.add_argument(
        "--noise-sigma",
        type=float,
        nargs="+",
        default=[],
        metavar="SIGMA",
        help="also read clean images behind Gaussian noise of this standard deviation, for pixels from 0 to 1",
    )
    parser.add_argument("--noise-images", type=int, default=200, metavar="N", help="images for it (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image's noise (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of the engines, 0 for every core")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/robustness.json"), help="(%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
