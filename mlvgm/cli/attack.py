"""``mlvgm attack``: change image files as little as makes a recipe's classifier misread them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlvgm.cli.bulk import Bulk, Row, print_row
from mlvgm.cli.options import add_files, add_models, add_pipeline, add_pngs, add_request, add_rows, request
from mlvgm.cli.purify import Purifier
from mlvgm.files import read_file, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from mlvgm.recipe import Recipe

_BATCH = 32
_PICTURED = 24  # images, on one sheet


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb's arguments."""
    parser = subparsers.add_parser(
        "attack",
        help="attack image files through a classifier",
        description="Attack images through a recipe's classifier, away from what it reads in them now, and write what "
        "comes out as 8-bit PNG. With --bundle, also say what purification makes of it. The same command goes on "
        "where work was cut off. Exit code 1 when an image could not be read or the attack on it failed.",
        epilog="Example: mlvgm attack signs/*.png --method deepfool --out attacked --bundle build/road-signs",
    )
    add_files(parser)
    add_models(parser, purifier=False, default="road-signs", help="whose classifier is attacked (%(default)s)")
    parser.add_argument("--method", choices=("deepfool", "cw"), default="cw", help="cw: Carlini-Wagner (%(default)s)")
    add_pngs(parser, "attacked")
    add_pipeline(parser, help="purify the attacked images with this bundle")
    add_request(parser)
    parser.add_argument("--picture", type=Path, metavar="FILE", help=f"show the first {_PICTURED} images on one PNG")
    add_rows(parser)


def run(args: argparse.Namespace) -> int:
    """Attack a batch after the other, and print what the classifier reads in the images before and after."""
    from evaluation.attacks import METHODS, fingerprint
    from export.models import recipe_classifier
    from mlvgm.recipe import Recipe

    recipe = Recipe.read(args.recipe)
    # Always the same noise: whoever attacks again sees what the attack has changed, not the luck of the draw.
    given = {**request(args), "seed": 0}
    purifier = Purifier(args.bundle, args.runtime, args.threads, **given) if args.bundle else None
    classifier = recipe_classifier(recipe, args.classifier)
    settings = {"method": args.method, "classifier": fingerprint(classifier, METHODS[args.method])}
    settings |= purifier.settings if purifier else {}
    job = Bulk(args.files, args.out, "attacked", settings, _BATCH, args.overwrite)
    rows: list[Row] = []
    failed = 0
    try:
        for row in job.run(lambda images: _attack(images, recipe, classifier, args.method, purifier)):
            print_row(row, args.json, _text)
            if "error" in row:
                failed += 1
            else:
                rows.append(row)
        if args.picture and rows:
            _picture(rows[:_PICTURED], recipe, purifier, args.picture)
    finally:
        if purifier:
            purifier.close()
    if rows:
        print(_totals(rows), file=sys.stderr if args.json else sys.stdout)
    return 1 if failed or not all(row["fooled"] for row in rows) else 0


def _attack(
    files: Sequence[bytes], recipe: "Recipe", classifier: "nn.Module", method: str, purifier: Purifier | None
) -> list[tuple[bytes, Row] | str]:
    """For each encoded image the attacked one as PNG and what is read in it, or what is wrong with it."""
    import numpy as np

    from evaluation.attacks import attack, predict
    from evaluation.photographs import encode
    from handlers.image import ImageError, decode

    images: dict[int, NDArray[np.uint8]] = {}
    outcomes: list[tuple[bytes, Row] | str] = [""] * len(files)
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


def _totals(rows: Sequence[Row]) -> str:
    """How many were fooled and, with a bundle, how many of these purification restored and flagged; 95 % intervals."""
    from statistics import median

    from evaluation.defences import wilson

    def share(what: str, mask: list[bool]) -> str:
        low, high = wilson(sum(mask), len(mask))
        return f"{what} {sum(mask)} of {len(mask)} ({low:.0%} to {high:.0%})"

    fooled = [row for row in rows if row["fooled"]]
    parts = [share("fooled", [row["fooled"] for row in rows])]
    if fooled:
        parts.append(f"median L2 {median(row['l2'] for row in fooled):.3f}")
        if "purified" in fooled[0]:
            parts.append(
                share("of these purified to what was read before", [r["purified"] == r["before"] for r in fooled])
            )
            parts.append(share("flagged", [row["flagged"] for row in fooled]))
    return ", ".join(parts)


def _picture(rows: Sequence[Row], recipe: "Recipe", purifier: Purifier | None, path: Path) -> None:
    from evaluation import contact_sheet
    from handlers.image import decode

    size = (recipe.image_size, recipe.image_size)
    attacked = [read_file(Path(row["attacked"])) for row in rows]
    purified = (
        [outcome[0] if isinstance(outcome, tuple) else None for outcome in purifier.purify(attacked)]
        if purifier
        else [None] * len(rows)
    )
    shown_rows = [
        contact_sheet.Row(
            row["before"],
            [
                contact_sheet.Picture(clean := decode(read_file(Path(row["file"])), size), row["before"]),
                contact_sheet.Picture(changed := decode(attacked[i], size), row["after"]),
                contact_sheet.change(clean, changed),
                contact_sheet.Picture(decode(png, size) if png else None, row.get("purified", "")),
            ],
        )
        for i, (row, png) in enumerate(zip(rows, purified, strict=True))
    ]
    heads = ("clean", "attacked", contact_sheet.CHANGE, "purified")
    contact_sheet.save(shown_rows, heads, f"{recipe.name}: {rows[0]['settings']['method']}", path)


def _text(row: Row) -> str:
    line = f"{shown(row['attacked'])}  {row['before']} -> {row['after']}  L2 {row['l2']:.3f}"
    if "purified" in row:
        line += f"  purified: {row['purified']} {row['agreement']:.0%}"
    return line + ("" if row["fooled"] else "  the attack failed")
