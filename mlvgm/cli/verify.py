"""Compare a bundle, stage by stage and as a whole, with the eager reference of the published operators.

It is run in every installed runtime, on clean and on attacked images. Exit code 1 where a difference is over the limit.

Example: mlvgm verify build/road-signs --json build/verify.json
"""

import argparse
from pathlib import Path

from handlers import runtimes
from handlers.manifest import Manifest
from mlvgm.cli.options import Parser, add_models, add_report, number, positive, read_recipe


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("bundle", type=Path, help="the folder that mlvgm export wrote")
    add_models(parser)
    add("--images", type=Path, metavar="FOLDER", help="photographs (default: random soft pictures)")
    add("--count", type=positive, default=4, metavar="N", help="images at most (%(default)s)")
    add("--samples", type=positive, default=2, metavar="N", help="purified samples of each (%(default)s)")
    add("--runtime", action="append", choices=runtimes.NAMES[1:], help="repeatable (default: all that are installed)")
    add("--no-attack", action="store_true", help="clean images only")
    add("--limit", type=number, help="relative L2 error allowed (default: by the bundle's precision)")
    add_report(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, and write the report."""
    manifest = Manifest.read(args.bundle)
    recipe = read_recipe(args, manifest)

    from evaluation import report, verification
    from evaluation.attacks import attack, predict
    from evaluation.photographs import pictures
    from evaluation.progress import say
    from export.models import load_models
    from export.precision import LIMITS

    purifier, classifier = load_models(recipe, args.purifier, args.classifier)
    sets = {"clean": pictures(args.images, args.count, manifest.image_size)}
    if not args.no_attack:
        print(f"attacking {len(sets['clean'])} images (DeepFool)", flush=True)
        sets["attacked"] = attack(classifier, sets["clean"], predict(classifier, sets["clean"]), "deepfool").images
    names = args.runtime or runtimes.available()
    limit = args.limit or max(
        LIMITS[manifest.precision], LIMITS[manifest.weights], getattr(classifier, "tolerance", 0.0)
    )
    rows = verification.verify(args.bundle, purifier, classifier, sets, names, args.samples, say=say)
    passed = all(row["relative_l2"] <= limit for row in rows)
    table = verification.markdown(rows, limit)
    print(table)
    print("passed" if passed else "FAILED: see the rows over the limit")
    if args.json:
        content = {**report.measured_here(), "limit": limit, "passed": passed, "rows": rows}
        report.save(content, table, args.json, lambda file: verification.plot(rows, limit, file))
    return 0 if passed else 1
