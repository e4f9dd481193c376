"""Classify labelled images under each threat: by the bundle as served, without its purifier, behind simple defences.

The report has accuracies with 95 % intervals, the share of images that withstand every attack, and a list of caveats.
An interrupted command resumes. Exit code 1 where --strict or --gate refuses.

Example: mlvgm evaluate build/road-signs --images ../gtsrb/test.npz --json build/evaluation.json
"""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.errors import CliError
from handlers.inputs import checked_samples
from handlers.pipeline import Pipeline
from mlvgm.cli.options import Parser, add_engines, add_models, add_request, number, positive, read_recipe, report_file
from mlvgm.cli.predict import add_server, find_server

if TYPE_CHECKING:
    from evaluation.budgets import Budget
    from evaluation.defences import Defence, Subject
    from evaluation.threats import Threat

THREATS = {
    "clean": "the images as they are",
    "noise": "Gaussian noise",
    "deepfool": "DeepFool on the classifier alone",
    "cw": "Carlini-Wagner on the classifier alone",
    "apgd": "Auto-PGD on the classifier alone, L2",
    "repeat": "the same, sent 10 times: one wrong answer is enough",
    "white": "Auto-PGD through the whole defence, L2",
    "engine": "the same, with the engines in the forward pass",
    "seed": "the same where clients may choose the seed: the noise is known",
    "quiet": "as white, and keeps the attack score low",
    "linf": "as white, but Linf",
    "square": "Square, which only asks (needs ART)",
    "hopskipjump": "HopSkipJump, which only asks for labels (needs ART)",
    "lowfreq": "gradients through the defence, low frequencies alone, of twice the L2 norm",
    "patch": "the same, any content in a square of 4 %%",
    "flow": "the same, points moved by up to a pixel",
    "defocus": "the same, a blur of up to a pixel",
    "certify": "no attack: a proven radius under noise",
}


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("bundle", type=Path, help="the folder that mlvgm export wrote")
    add(
        "--images",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="CLASS/IMAGE, where CLASS is a label of the bundle or its number; or an .npz file with images and labels",
    )
    add_models(parser)
    add_engines(parser)
    add_server(parser)
    add("--budget", choices=("quick", "standard", "full"), default="quick", help="(%(default)s)")
    add(
        "--threat",
        action="append",
        choices=THREATS,
        metavar="NAME",
        help="repeatable (default: clean, deepfool, apgd and white, but all where the budget is more than quick): "
        + "; ".join(f"{name}: {said}" for name, said in THREATS.items()),
    )
    add(
        "--defence",
        action="append",
        metavar="NAME",
        help="repeatable: none, blur, noise, jpeg, bits, kept (nothing resampled), one (one sample), served, "
        "server (a running one with this bundle, asked over HTTP), or another schedule of the bundle (default: none, "
        "blur, kept and served, but all of the bundle where the budget is more)",
    )
    add(
        "--comparators",
        type=Path,
        metavar="FOLDER",
        help="what python -m evaluation.comparators has trained: further defences pgd, trades, another, smoothed, each "
        "also behind the purifier (served-pgd, ...), avae and ndvae",
    )
    add("--limit", type=positive, metavar="N", help="images, the first of a fixed random order")
    add("--few", type=positive, metavar="N", help="of these, for threats that take long")
    add(
        "--worst",
        action="store_true",
        help="ask for the worst over all attacks alone: what one has broken the costly ones that follow need not "
        "attack, so they are taken on all images (or --few)",
    )
    for name in ("steps", "restarts", "draws"):
        add(f"--{name}", type=positive, metavar="N", help="of gradients, instead of the budget's")
    add("--bf16", action="store_true", help="gradients in bf16: about twice as fast on a CPU with AMX")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="for gradients (%(default)s)")
    add_request(parser)
    add("--l2", type=number, default=0.5, help="largest L2 norm of a change (%(default)s)")
    add("--linf", type=number, default=4 / 255, help="largest change of a value (4/255)")
    add("--sigma", type=number, default=0.25, help="of Gaussian noise (%(default)s)")
    add("--cache", type=Path, default=Path("build/attacks"), metavar="DIR", help="(%(default)s)")
    add(
        "--json",
        type=report_file,
        default=Path("build/evaluation.json"),
        metavar="FILE",
        help="for the report; .md and .png go beside it, and .jsonl, from which work goes on (%(default)s)",
    )
    add("--strict", action="store_true", help="exit code 1 where the report has caveats")
    add("--gate", type=Path, metavar="FILE", help="YAML of least shares that must be reached")


def run(args: argparse.Namespace) -> int:
    """Measure, print the page, write the report, and refuse what misses the gate."""
    from evaluation import report, robustness_report
    from evaluation.gate import Gate

    if args.json.suffix in (".jsonl", ".md", ".png"):
        raise CliError(f"--json {args.json}: what goes beside the report has that name; name it {args.json.stem}.json")
    gate = Gate.read(args.gate) if args.gate else None
    with Pipeline.load(args.bundle, args.runtime, args.threads) as pipeline:
        content = _measure(args, pipeline)
    page = robustness_report.markdown(content)
    print(page)
    report.save(content, page, args.json, lambda file: robustness_report.plot(content, file))
    refusals = gate.refusals(content) if gate else []
    for line in refusals:
        print(f"refused by {args.gate}: {line}", file=sys.stderr)
    return 1 if refusals or (args.strict and content["caveats"]) else 0


def _measure(args: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    from evaluation import report, robustness
    from evaluation.caveats import caveats
    from evaluation.comparators.rows import training
    from evaluation.photographs import read_labelled

    manifest = pipeline.manifest
    budget = _budget(args)
    subject = _subject(args, pipeline)
    rows, columns = _rows(args, subject), _columns(args, budget)
    signs = read_labelled(args.images, manifest.classes, manifest.image_size, budget.images)
    log = robustness.Log(args.json.with_suffix(".jsonl"))
    worst = args.l2 if args.worst else None
    cells = robustness.measure(subject, rows, columns, signs.images, signs.labels, budget, log, args.cache, worst)
    content = robustness.summarise(cells, rows, columns, args.l2) | {
        "model": f"{manifest.name} {manifest.version}",
        "images": str(args.images),
        "n": len(signs),
        "l2": args.l2,
        "few": min(budget.few, len(signs)),
        "budget_name": args.budget,
        "budget": dataclasses.asdict(budget),
        "command": shlex.join(["mlvgm", *sys.argv[1:]]),
        "runtime": pipeline.runtime,
        "precision": manifest.precision,
        "training": training(args.comparators) if args.comparators else {},
        "files": {name: digest.sha256 for name, digest in manifest.files.items()},
        **report.measured_here(),
    }
    return {**content, "caveats": caveats(content, cells)}


def _budget(args: argparse.Namespace) -> "Budget":
    from evaluation.budgets import BUDGETS

    budget = BUDGETS[args.budget]
    given = {name: value for name in ("steps", "restarts", "draws", "bf16") if (value := getattr(args, name))}
    images = args.limit or budget.images
    few = args.few or (images or sys.maxsize if args.worst else budget.few)
    return dataclasses.replace(budget, effort=dataclasses.replace(budget.effort, **given), images=images, few=few)


def _subject(args: argparse.Namespace, pipeline: Pipeline) -> "Subject":
    import torch

    from evaluation.defences import Subject
    from export.classifier import stage
    from export.models import load_models

    if args.device == "cuda" and not torch.cuda.is_available():
        raise CliError("--device cuda: PyTorch finds no GPU here")
    manifest = pipeline.manifest
    recipe = read_recipe(args, manifest)
    purifier, classifier = load_models(recipe, args.purifier, args.classifier)
    adapted: Any = stage(classifier, recipe.image_size, len(recipe.classes)).reference
    return Subject(pipeline, purifier.requires_grad_(False), adapted.requires_grad_(False), recipe.blur, args.device)


def _rows(args: argparse.Namespace, subject: "Subject") -> "dict[str, Defence]":
    from evaluation.budgets import QUICK_DEFENCES
    from evaluation.comparators.rows import comparators
    from evaluation.defences import defences, remote

    known = subject.pipeline.manifest.alphas
    checked_samples(subject.pipeline.manifest, args.samples)
    if args.alphas and args.alphas not in known:
        raise CliError(f"the bundle has no schedule {args.alphas!r}: it has {', '.join(known)}")
    rows = defences(subject, args.samples, args.alphas)
    if "server" in (args.defence or ()):
        rows["server"] = remote(rows["served"], *find_server(args), len(subject.pipeline.manifest.classes))
    trained = comparators(subject, args.comparators, args.samples, args.alphas) if args.comparators else {}
    rows |= trained
    wanted = args.defence or ((*QUICK_DEFENCES, *trained) if args.budget == "quick" else rows)
    for name in wanted:
        if name not in rows:
            raise CliError(f"there is no defence {name!r}: there are {', '.join(rows)}")
    return {name: row for name, row in rows.items() if name in wanted}


def _columns(args: argparse.Namespace, budget: "Budget") -> "dict[str, Threat]":
    from evaluation.budgets import QUICK, threats

    columns = threats(budget, args.l2, args.linf, args.sigma)
    wanted = args.threat or (QUICK if args.budget == "quick" else columns)
    chosen = {name: column for name, column in columns.items() if name in ("clean", *wanted)}
    for column in chosen.values():
        column.check()
    return chosen
