"""Classify clean and attacked validation images with samples: auto and with the bundle's maximum.

Both have the same noise, batch by batch in turn. Says how many labels are equal, how many samples were drawn, and how
many times as fast auto is.

Example: mlvgm bench vote --bundle build/road-signs --data ../gtsrb --json build/vote.json
"""

import argparse
from pathlib import Path
from typing import Any

from mlvgm.cli.options import Parser, add_models, add_pipeline, load_pipeline, positive, read_recipe


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add_pipeline(parser, required=True)
    add_models(parser, purifier=False)
    add("--data", type=Path, required=True, help="GTSRB, or a folder with validation/CLASS/IMAGE")
    add("--attacks", nargs="*", choices=("deepfool", "cw"), default=["deepfool"], help="(deepfool)")
    add("--images", type=positive, default=1000, metavar="N", help="of each kind (%(default)s)")
    add("--batch", type=positive, default=32, metavar="N", help="images a call (%(default)s)")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Any, None]:
    """Attack and measure; returns the content of the report and its page."""
    from benchmarks import vote
    from evaluation.attacks import attack
    from evaluation.photographs import read_validation
    from export.models import recipe_classifier

    with load_pipeline(args) as pipeline:
        manifest = pipeline.manifest
        signs = read_validation(args.data, manifest.classes, manifest.image_size, args.images)
        sets = {"clean": signs.images}
        if args.attacks:
            classifier = recipe_classifier(read_recipe(args, manifest), args.classifier)
            for name in args.attacks:
                cache = Path("build/attacks")
                sets[name] = attack(classifier, signs.images, signs.labels, name, cache).images
        pipeline.warm_up()
        content = {
            "bundle": f"{manifest.name} {manifest.version}",
            "images": len(signs),
            "batch": args.batch,
            "maximum": manifest.samples.max,
            "runtime": pipeline.runtime,
            "precision": manifest.precision,
            "sets": {name: vote.measure(pipeline, images, signs.labels, args.batch) for name, images in sets.items()},
        }
    return content, vote.markdown, None
