"""Choose how much of each latent is drawn afresh.

Scaled linear, cosine and constant schedules are tried first, then Bayesian optimisation goes on from there; or gradient
descent on the classifier's loss from several starts (--method). The score is the mean of the accuracies on clean and on
attacked validation images after purification. The best few are compared once more on images that neither has seen, with
the bundle's own weights beside them. A winner that is better by more than chance is printed as it goes into a recipe;
or else that there is no difference.

Example: mlvgm tune --bundle build/road-signs --data ../gtsrb --images 300 --out build/tuned.json
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.errors import CliError
from evaluation.progress import bar, say, track
from handlers.inputs import checked_samples
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline
from handlers.score import ScoreThreshold
from mlvgm.cli.options import Parser, add_models, add_pipeline, load_pipeline, positive, read_recipe, report_file
from mlvgm.recipe import Recipe

if TYPE_CHECKING:
    from evaluation.tuning import Gain, Objective, Sets, Trial

_CHUNK = 64
_GRADIENT = "gradient from "


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add_pipeline(parser, default=Path("build/road-signs"), help="(%(default)s)")
    add_models(parser)
    add("--data", type=Path, required=True, help="GTSRB, or a folder with validation/CLASS/IMAGE")
    add(
        "--score",
        type=float,
        metavar="RATE",
        help="instead: set from which attack score on the bundle calls an image suspicious, so that this share of "
        "clean images is, on average (0.01). Takes all validation images, and no attack",
    )
    add("--images", type=positive, default=300, help="to search with (%(default)s)")
    add("--check", type=positive, default=600, help="other images, to compare the best with (%(default)s)")
    add("--finalists", type=positive, default=5, help="how many are compared so (%(default)s)")
    add("--samples", type=positive, default=4, help="purified samples that vote (%(default)s)")
    methods = ("bayesian", "gradient", "both")
    add("--method", choices=methods, default="bayesian", help="both compares the best of the two as well (%(default)s)")
    add("--trials", type=positive, default=100, help="of the search, at most (%(default)s)")
    add("--steps", type=positive, default=60, help="of each gradient descent (%(default)s)")
    add("--attacks", nargs="+", choices=("deepfool", "cw"), default=["deepfool", "cw"])
    add("--out", type=report_file, default=Path("build/tuned.json"), help="for all trials (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Attack, search, compare the finalists, and write and print the winner."""
    if args.score is not None:
        return _set_threshold(args)
    from evaluation import tuning

    with load_pipeline(args) as pipeline:
        checked_samples(pipeline.manifest, args.samples)
        recipe = read_recipe(args, pipeline.manifest)
        trials, finalists, as_it_is = _measure(args, pipeline, recipe)
    best = finalists[0]
    gain = tuning.gain(best, as_it_is, len(finalists))
    content = {
        "model": pipeline.manifest.name,
        "alphas": (best if gain.is_certain else as_it_is).weights,
        "gain": {**dataclasses.asdict(gain), "is_certain": gain.is_certain},
        "finalists": [_entry(trial) for trial in finalists],
        "as_it_is": _entry(as_it_is),
        "trials": [_entry(trial) for trial in trials],
        **{name: getattr(args, name) for name in ("images", "check", "samples", "attacks", "method")},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for trial in [*finalists, as_it_is]:
        print(f"{trial.origin:28} {tuning.describe(trial)}")
    if args.method == "both":
        print(_compared(finalists))
    if not gain.is_certain:
        print(f"no difference: the best scores {_interval(gain)} against the bundle's own weights; keep these")
        return 0
    # A recipe's weights are multiplied by its attenuation before use; these are what is used.
    scale = recipe.attenuation or 1.0
    print(f"better than the bundle's own weights by {_interval(gain)}:")
    print(f"  tuned: [{', '.join(f'{weight / scale:g}' for weight in best.weights)}]")
    return 0


def _measure(args: argparse.Namespace, pipeline: Pipeline, recipe: Recipe) -> "tuple[list[Trial], list[Trial], Trial]":
    """All trials; the best of them on images that the search has not seen; and there the bundle's own weights."""
    from evaluation import tuning

    manifest, sets = pipeline.manifest, _attacked(args, pipeline.manifest, recipe)
    seen, unseen = sets.part(slice(args.images)), sets.part(slice(args.images, None))
    score = tuning.objective(pipeline, seen, args.samples)
    trials: list[Trial] = []
    if args.method != "gradient":
        trials += _search(args, score, manifest.n_latents)
    if args.method != "bayesian":
        trials += _learn(args, pipeline, recipe, score, seen)
    say(f"comparing the best on {len(unseen.labels)} other images", sys.stderr)
    score, trials = tuning.objective(pipeline, unseen, args.samples), tuning.ranked(trials)
    finalists = [score(trial.weights, trial.origin) for trial in _finalists(trials, args.finalists)]
    as_it_is = score(manifest.alphas[manifest.default_alphas], f"the bundle's own, {manifest.default_alphas}")
    return trials, tuning.ranked(finalists), as_it_is


def _attacked(args: argparse.Namespace, manifest: Manifest, recipe: Recipe) -> "Sets":
    """The validation images, for the search and for the comparison after it."""
    from evaluation.attacks import attack
    from evaluation.photographs import read_validation
    from evaluation.tuning import Sets
    from export.models import recipe_classifier

    classifier = recipe_classifier(recipe, args.classifier)
    signs = read_validation(args.data, manifest.classes, manifest.image_size, args.images + args.check)
    if len(signs) <= args.images:
        raise CliError(f"{args.data}: {len(signs)} validation images, too few for --images {args.images}")
    say(f"attacking {len(signs)} validation images", sys.stderr)
    cache = Path("build/attacks")
    attacked = {name: attack(classifier, signs.images, signs.labels, name, cache).images for name in args.attacks}
    return Sets(signs.images, attacked, signs.labels)


def _search(args: argparse.Namespace, score: "Objective", n: int) -> "list[Trial]":
    from evaluation import tuning

    with bar(args.trials, "searching", "trial") as shown:

        def tell(trial: "Trial") -> None:
            shown.update()
            say(tuning.describe(trial), sys.stderr)

        return tuning.search(score, n, args.trials, tell)


def _learn(
    args: argparse.Namespace, pipeline: Pipeline, recipe: Recipe, score: "Objective", sets: "Sets"
) -> "list[Trial]":
    from evaluation import learning, tuning
    from export.classifier import stage
    from export.models import load_models

    manifest, trials = pipeline.manifest, []
    purifier, classifier = load_models(recipe, args.purifier, args.classifier)
    adapted: Any = stage(classifier, recipe.image_size, len(recipe.classes)).reference
    given = {"steps": args.steps, "blur": recipe.blur, "input_noise_l2": manifest.input_noise_l2}
    starts = learning.starts(manifest.n_latents, manifest.alphas[manifest.default_alphas])
    for name, start in track(list(starts.items()), "descending", "start"):
        trials.append(score(learning.learn(purifier, adapted, sets, start, **given), f"{_GRADIENT}{name}"))
        say(tuning.describe(trials[-1]), sys.stderr)
    return trials


def _finalists(trials: "list[Trial]", count: int) -> "list[Trial]":
    """The best, of both methods where there are two."""
    chosen = trials[:count]
    kinds = {_is_learned(trial) for trial in chosen}
    return chosen + [trial for trial in trials[count:] if _is_learned(trial) not in kinds][:1]


def _compared(finalists: "list[Trial]") -> str:
    """The best trial of all and that of the other method."""
    from evaluation import tuning

    ahead = finalists[0]
    behind = next(trial for trial in finalists if _is_learned(trial) != _is_learned(ahead))
    # Each is the best of some on these images; the interval is that of a comparison of all with all.
    gain = tuning.gain(ahead, behind, len(finalists))
    said = "better" if gain.is_certain else "no difference"
    return f"{ahead.origin} against {behind.origin}: {_interval(gain)}, {said}"


def _is_learned(trial: "Trial") -> bool:
    return trial.origin.startswith(_GRADIENT)


def _interval(gain: "Gain") -> str:
    return f"{gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"


def _set_threshold(args: argparse.Namespace) -> int:
    """Score clean images as they are served, and write the threshold into the bundle's manifest."""
    from evaluation.photographs import read_validation

    with load_pipeline(args) as pipeline:
        manifest = pipeline.manifest
        images = read_validation(args.data, manifest.classes, manifest.image_size).images
        ScoreThreshold.of(np.zeros(len(images)), args.score)  # refuses too few before the work
        chunks = np.split(np.arange(len(images)), range(_CHUNK, len(images), _CHUNK))
        scores = [
            pipeline.run(images[rows], seeds=rows.tolist()).scores
            for rows in track(chunks, "scoring", f"x{_CHUNK} image")
        ]
    found = ScoreThreshold.of(np.concatenate(scores), args.score)
    dataclasses.replace(manifest, score=found).write(args.bundle)
    print(
        f"{args.bundle}: a score above {found.threshold:.4g} is suspicious. Of {len(images)} clean images "
        f"{(np.concatenate(scores) > found.threshold).sum()} are; of further ones {found.low:.2%} to {found.high:.2%} "
        "will be (95 %)"
    )
    return 0


def _entry(trial: "Trial") -> dict[str, Any]:
    scores = {name: round(getattr(trial, name), 5) for name in ("score", "clean", "attacked")}
    return {"alphas": trial.weights, "origin": trial.origin, **scores}
