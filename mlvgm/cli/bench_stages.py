"""Run the pipeline with the published operators in eager PyTorch, rewritten, and exported in every runtime here.

All on the same images and noise: images a second, ratios, memory, errors.

Example: mlvgm bench stages --recipe celeba-gender --synthetic --batch 1 4 --json build/stages.json
"""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.errors import CliError
from evaluation.progress import say
from handlers.arrays import Pixels
from handlers.manifest import FILE_NAME, Manifest
from mlvgm.cli.options import Parser, add_models, add_threads, number, positive
from mlvgm.recipe import Recipe

if TYPE_CHECKING:
    from benchmarks.stages import ModelUnderTest


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add_models(parser, action="append", help="name or YAML file; repeatable (default: road-signs)")
    add("--synthetic", action="store_true", help="random weights in the published format instead")
    add("--batch", type=positive, nargs="+", default=[1, 4], metavar="B", help="images a call (1 4)")
    add("--samples", type=positive, nargs="+", default=[1], metavar="N", help="purified samples (1)")
    add("--images", type=Path, metavar="FOLDER", help="photographs (default: random soft pictures)")
    add("--compare", type=positive, default=8, metavar="N", help="purified images to compare (%(default)s)")
    add("--seconds", type=number, default=10, help="to measure each row for, at least (%(default)s)")
    add_threads(parser)
    add("--work", type=Path, metavar="FOLDER", help="keep checkpoints and bundles, and reuse bundles")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Any, Any]:
    """Measure every recipe; returns the content of the report, its page and its plot."""
    from benchmarks import stages

    recipes = args.recipe or ["road-signs"]
    if (args.purifier or args.classifier) and len(recipes) > 1:
        raise CliError("--purifier and --classifier belong to one recipe; give --recipe once")
    loads = [stages.Load(batch, samples, args.compare) for samples in args.samples for batch in args.batch]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for name in recipes:
            model = _model(args, name, work)
            rows += stages.measure(model, _images(args, model), loads, args.seconds, args.threads, say=say)
    weights = "Synthetic weights." if args.synthetic else "The recipe's or the given weights."
    return {"weights": weights, "rows": rows}, stages.markdown, lambda content, file: stages.plot(content["rows"], file)


def _model(args: argparse.Namespace, name: str, work: Path) -> "ModelUnderTest":
    """The recipe with its files, exported where no bundle of it is there yet."""
    from benchmarks.stages import ModelUnderTest
    from benchmarks.synthetic import write_checkpoints
    from export.bundle import export_bundle
    from export.models import load_models
    from mlvgm import checkpoint

    recipe = Recipe.read(name)
    purifier, classifier = args.purifier, args.classifier
    if args.synthetic and recipe.purifier is None:
        print(f"{name}: drawing random weights", flush=True)
        purifier, classifier = write_checkpoints(recipe, work / f"{recipe.name}-checkpoints")
    bundle = work / recipe.name
    if not (bundle / FILE_NAME).is_file():
        with checkpoint.mapped():
            models = load_models(recipe, purifier, classifier)
            export_bundle(recipe, *models, bundle, progress=lambda line: print(f"{name}: {line}", flush=True))
    return ModelUnderTest(name, bundle, purifier, classifier)


def _images(args: argparse.Namespace, model: "ModelUnderTest") -> Pixels:
    from evaluation.photographs import pictures

    count = max(*args.batch, args.compare)
    images = pictures(args.images, count, Manifest.read(model.bundle).image_size)
    if len(images) < count:
        raise CliError(f"{args.images}: holds {len(images)} images; --batch and --compare want {count}")
    return images
