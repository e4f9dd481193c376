"""Attack images through a recipe's classifier, away from what it reads in them now; write 8-bit PNGs.

With --bundle, also say what purification makes of it. The same command goes on where work was cut off. Exit code 1 when
an image could not be read or the attack on it failed.

Example: mlvgm attack signs/*.png --method deepfool --out attacked --bundle build/road-signs
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from handlers.arrays import Pixels
from handlers.image import ImageError, decode
from mlvgm.cli.bulk import Bulk, Outcome, Row, print_row
from mlvgm.cli.options import (
    Parser,
    add_files,
    add_models,
    add_pipeline,
    add_pngs,
    add_request,
    add_rows,
    report_file,
    request,
)
from mlvgm.cli.purify import FilePurifier
from mlvgm.files import read_file, shown
from mlvgm.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

_BATCH = 32
_PICTURED = 24  # images, on one sheet


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add_files(parser)
    add_models(parser, purifier=False, default="road-signs", help="whose classifier is attacked (%(default)s)")
    parser.add_argument("--method", choices=("deepfool", "cw"), default="cw", help="cw: Carlini-Wagner (%(default)s)")
    add_pngs(parser, "attacked")
    add_pipeline(parser, help="purify the attacked images with this bundle")
    add_request(parser)
    add_rows(parser)
    parser.add_argument(
        "--picture", type=report_file, metavar="FILE", help=f"show the first {_PICTURED} images on one PNG"
    )


def run(args: argparse.Namespace) -> int:
    """Attack a batch after the other, and print what the classifier reads in the images before and after."""
    from evaluation.attacks import METHODS, fingerprint
    from export.models import recipe_classifier

    recipe = Recipe.read(args.recipe)
    # Always the same noise: whoever attacks again sees what the attack has changed, not the luck of the draw.
    given = {**request(args), "seed": 0}
    classifier = recipe_classifier(recipe, args.classifier)
    settings = {"method": args.method, "classifier": fingerprint(classifier, METHODS[args.method])}
    with contextlib.ExitStack() as stack:
        purifier = None
        if args.bundle:
            purifier = stack.enter_context(FilePurifier(args.bundle, args.runtime, args.threads, **given))
            settings |= purifier.settings
        job = Bulk(args.files, args.out, "attacked", settings, _BATCH, args.overwrite)
        rows = []
        for row in job.run(lambda images: _attack(images, recipe, classifier, args.method, purifier)):
            print_row(row, args.json, "" if "error" in row else _text(row))
            rows.append(row)
        attacked = [row for row in rows if "error" not in row]
        if args.picture and attacked:
            _draw(attacked[:_PICTURED], recipe, purifier, args.picture)
    if attacked:
        print(_totals(attacked), file=sys.stderr if args.json else sys.stdout)
    return 0 if all(row.get("fooled") for row in rows) else 1


def _attack(
    files: Sequence[bytes], recipe: Recipe, classifier: "nn.Module", method: str, purifier: FilePurifier | None
) -> Sequence[Outcome]:
    """For each encoded image the attacked one as PNG and what is read in it, or what is wrong with it."""
    from evaluation.attacks import attack, predict
    from evaluation.photographs import encode

    images: dict[int, Pixels] = {}
    outcomes: list[Outcome] = [""] * len(files)
    for i, file in enumerate(files):
        try:
            images[i] = decode(file, (recipe.image_size, recipe.image_size))
        except ImageError as error:
            outcomes[i] = str(error)
    if not images:
        return outcomes
    clean = np.stack(list(images.values()))
    before = predict(classifier, clean)
    result = attack(classifier, clean, before, method)
    after = predict(classifier, result.images)
    pngs = [encode(pixels) for pixels in result.images]
    purified = purifier.purify(pngs) if purifier else [None] * len(pngs)
    for place, i in enumerate(images):
        row: dict[str, Any] = {
            "before": recipe.classes[before[place]],
            "after": recipe.classes[after[place]],
            "fooled": bool(result.fooled[place]),
            "l2": round(float(result.l2[place]), 4),
        }
        answer = purified[place]
        if isinstance(answer, tuple):
            row |= {"purified": answer[1]["label"]} | {key: answer[1][key] for key in ("agreement", "flagged")}
        outcomes[i] = answer if isinstance(answer, str) else (pngs[place], row)
    return outcomes


def _draw(rows: Sequence[Row], recipe: Recipe, purifier: FilePurifier | None, path: Path) -> None:
    """Each image, clean, attacked, the change between them, and purified."""
    from evaluation.contact_sheet import CHANGE, Picture, SheetRow, change, save

    size = (recipe.image_size, recipe.image_size)
    files = [read_file(Path(row["attacked"])) for row in rows]
    purified = purifier.purify(files) if purifier else [""] * len(files)
    lines = []
    for row, file, outcome in zip(rows, files, purified, strict=True):
        clean, attacked = decode(read_file(Path(row["file"])), size), decode(file, size)
        after = decode(outcome[0], size) if isinstance(outcome, tuple) else None
        pictures = [Picture(clean, row["before"]), Picture(attacked, row["after"]), change(clean, attacked)]
        lines.append(SheetRow(row["before"], [*pictures, Picture(after, row.get("purified", ""))]))
    method = rows[0]["settings"]["method"]
    save(lines, ("clean", "attacked", CHANGE, "purified"), f"{recipe.name}: {method}", path)


def _totals(rows: Sequence[Row]) -> str:
    """How many were fooled and, with a bundle, how many of these purification restored and flagged; 95 % intervals."""
    from evaluation.shares import wilson

    def share(what: str, mask: list[bool]) -> str:
        low, high = wilson(sum(mask), len(mask))
        return f"{what} {sum(mask)} of {len(mask)} ({low:.0%} to {high:.0%})"

    fooled = [row for row in rows if row["fooled"]]
    parts = [share("fooled", [row["fooled"] for row in rows])]
    if fooled:
        parts.append(f"median L2 {median(row['l2'] for row in fooled):.3f}")
        if "purified" in fooled[0]:
            restored = [row["purified"] == row["before"] for row in fooled]
            parts.append(share("of these purified to what was read before", restored))
            parts.append(share("flagged", [row["flagged"] for row in fooled]))
    return ", ".join(parts)


def _text(row: Row) -> str:
    line = f"{shown(row['attacked'])}  {row['before']} -> {row['after']}  L2 {row['l2']:.3f}"
    if "purified" in row:
        line += f"  purified: {row['purified']} {row['agreement']:.0%}"
    return line + ("" if row["fooled"] else "  the attack failed")
