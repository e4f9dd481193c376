"""``mlvgm attack``: change image files as little as makes a recipe's classifier misread them."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.errors import CliError
from mlvgm.cli.files import with_targets

if TYPE_CHECKING:
    from mlvgm.recipe import Recipe


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb's arguments."""
    parser = subparsers.add_parser(
        "attack",
        help="attack image files through a classifier",
        description="Attack images through a recipe's classifier, away from what it reads in them now, and write what "
        "comes out as 8-bit PNG. With --bundle, also say what purification makes of it. Exit code 1 when an image "
        "could not be read or the attack on it failed.",
        epilog="Example: mlvgm attack signs/*.png --method deepfool --out attacked --bundle build/road-signs",
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="JPEG, PNG, WebP or BMP, or a folder of them"
    )
    parser.add_argument("--recipe", default="road-signs", help="whose classifier is attacked (%(default)s)")
    parser.add_argument("--classifier", type=Path, help="its checkpoint, where the recipe ships none")
    parser.add_argument("--method", choices=("deepfool", "cw"), default="cw", help="cw: Carlini-Wagner (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("attacked"), metavar="DIR", help="for the PNGs (%(default)s)")
    parser.add_argument("--bundle", type=Path, help="purify the attacked images with this bundle")
    parser.add_argument("--samples", type=int, help="purified copies that vote (default: the bundle's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image, one a line")


def run(arguments: argparse.Namespace) -> int:
    """Attack all images at once, then write and print them one by one."""
    import numpy as np

    from evaluation.attacks import attack, load_target, predict
    from handlers.image import ImageError, decode
    from mlvgm.recipe import Recipe

    recipe = Recipe.read(arguments.recipe)
    classifier = load_target(recipe, arguments.classifier)
    targets, images, failed = [], [], 0
    for source, target in with_targets(arguments.files, arguments.out):
        try:
            images.append(decode(source.read_bytes(), (recipe.image_size, recipe.image_size)))
            targets.append((source, target))
        except (ImageError, OSError) as error:
            failed += 1
            reason = error.strerror if isinstance(error, OSError) else str(error)
            print(f"{source}: {reason}", file=sys.stderr)
    if not images:
        raise CliError("no image to attack")
    clean = np.stack(images)
    labels = predict(classifier, clean)
    result = attack(classifier, clean, labels, arguments.method)
    after = predict(classifier, result.images)
    rows: list[dict[str, Any]] = [
        {
            "file": str(source),
            "attacked": str(target),
            "before": recipe.classes[labels[i]],
            "after": recipe.classes[after[i]],
            "fooled": bool(result.fooled[i]),
            "l2": round(float(result.l2[i]), 4),
        }
        for i, (source, target) in enumerate(targets)
    ]
    if arguments.bundle:
        _purify(rows, result.images, arguments)
    _write(targets, result.images)
    _print(rows, recipe, arguments.json)
    return 1 if failed or not result.fooled.all() else 0


def _purify(rows: list[dict[str, Any]], images: Any, arguments: argparse.Namespace) -> None:
    """Add what the pipeline of ``arguments.bundle`` answers about the attacked ``images`` to ``rows``."""
    from handlers.pipeline import Pipeline

    with Pipeline.load(arguments.bundle) as pipeline:
        result = pipeline.run(images, samples=arguments.samples)
        for i, row in enumerate(rows):
            row["purified"] = pipeline.manifest.classes[result.labels[i]]
            row["agreement"] = round(float(result.agreement[i]), 4)
            row["flagged"] = bool(result.flagged[i])


def _write(targets: list[tuple[Path, Path]], images: Any) -> None:
    from PIL import Image

    for (_, target), pixels in zip(targets, images, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)


def _print(rows: list[dict[str, Any]], recipe: "Recipe", as_json: bool) -> None:
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    width = max(4, *(len(row["attacked"]) for row in rows))
    names = max(len(name) for name in recipe.classes)
    purified = "purified" in rows[0]
    head = f"{'file':{width}}  {'before':{names}}  {'after':{names}}  {'L2':>6}"
    print(head + (f"  {'purified':{names}}  agreement" if purified else ""))
    for row in rows:
        line = f"{row['attacked']:{width}}  {row['before']:{names}}  {row['after']:{names}}  {row['l2']:6.3f}"
        if purified:
            line += f"  {row['purified']:{names}}  {row['agreement']:9.0%}"
        print(line + ("" if row["fooled"] else "  the attack failed"))
