"""How far purification helps against attacks, measured as it is served: 8-bit images in, a vote of K copies out.

    python -m benchmarks.robustness --bundle build/road-signs --data GTSRB --json benchmarks/results/robustness.json

Two kinds of attackers. The first knows the classifier alone (DeepFool and Carlini-Wagner, as in the paper); beside the
purifier stand the bare classifier and two simple defences that any serious one has to beat. The second knows the whole
defence but its noise. Attacked images are kept in build/attacks, so measuring other weights is quick.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import evaluation, machine, report
from benchmarks.adaptive import Adaptive, attack_within, defended, undefended
from benchmarks.attacks import METHODS, AttackResult, attack, settings, to_float
from benchmarks.evaluation import Defence, Images, Labels, Reading, share
from handlers.pipeline import Pipeline
from mlvgm.load import Default, load_default

CACHE = Path("build/attacks")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write JSON, a Markdown table and a plot. Returns 0."""
    args = _parser().parse_args(arguments)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    signs = evaluation.photographs(args.data, args.part, args.limit)
    with Pipeline.load(args.bundle, threads=args.threads) as pipeline:
        default = load_default(args.recipe or str(pipeline.manifest.source.get("recipe", "road-signs")))
        samples = args.samples or pipeline.manifest.samples.default
        schedule = args.alphas or pipeline.manifest.default_alphas
        content: dict[str, Any] = {
            "benchmark": "robustness",
            "model": pipeline.manifest.name,
            "part": args.part,
            "n": len(signs),
            "samples": samples,
            "schedule": schedule,
            "alphas": list(pipeline.manifest.alphas[schedule]),
            "seed": args.seed,
            "runtime": pipeline.runtime,
            "precision": pipeline.manifest.precision,
            "files": {name: seal.sha256 for name, seal in pipeline.manifest.files.items()},
            "machine": machine.describe(),
        }
        defences = {
            "none": evaluation.bare(pipeline),
            "blur": evaluation.blur(pipeline),
            "noise": evaluation.noise(pipeline, samples, args.seed),
            "purifier": evaluation.purifier(pipeline, samples, args.seed, schedule),
        }
        content |= measure(default, defences, signs.images, signs.labels, args.methods)
        if args.adaptive:
            few = slice(0, args.adaptive)
            content["adaptive"] = measure_adaptive(
                default, pipeline.manifest.alphas[schedule], defences, signs.images[few], signs.labels[few], args
            )
    content["doubts"] = doubts(content)
    content["seconds"] = round(time.monotonic() - begun, 1)
    report.write(content, args.json)
    print(report.markdown(content))
    return 0


def measure(
    default: Default, defences: dict[str, Defence], images: Images, labels: Labels, methods: Sequence[str]
) -> dict[str, Any]:
    """Attack the classifier with each of ``methods`` and have every defence read what comes out.

    Returns:
        "attacks", "accuracy" (defence -> set of images -> share), "copies" and "detection" (of the purifier).
    """
    sets: dict[str, Images] = {"clean": images}
    attacks: dict[str, Any] = {}
    right = evaluate_eager(default, images) == labels
    for method in methods:
        begun = time.monotonic()
        result = attack(default.classifier, images, labels, method, CACHE)
        sets[method] = result.images
        attacks[method] = _describe(method, result, right) | {"seconds": round(time.monotonic() - begun, 1)}
    accuracy: dict[str, dict[str, Any]] = {}
    readings: dict[str, Reading] = {}
    for name, defence in defences.items():
        readings = {key: defence(attacked) for key, attacked in sets.items()}
        accuracy[name] = {key: share(reading.labels == labels) for key, reading in readings.items()}
        if name == "none":
            for method in methods:
                agree = readings[method].labels == evaluate_eager(default, sets[method])
                attacks[method]["engine_agrees"] = share(agree)
    purified = readings  # of the last defence, which is the purifier
    return {
        "attacks": attacks,
        "accuracy": accuracy,
        "copies": {
            key: {
                "one": share(reading.copies == labels[:, None])["share"],
                "all": share((reading.copies == labels[:, None]).all(axis=1)),
            }
            for key, reading in purified.items()
        },
        "detection": {
            key: {"flagged": share(reading.flagged), "agreement": round(float(reading.agreement.mean()), 4)}
            for key, reading in purified.items()
        },
    }
