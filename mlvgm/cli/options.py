"""Options that several verbs take: each group declares them, and makes of them what they describe."""

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deploy.errors import CliError
from handlers import runtimes

if TYPE_CHECKING:
    from handlers.manifest import Manifest
    from handlers.pipeline import Pipeline
    from mlvgm.recipe import Recipe

Parser = argparse.ArgumentParser


def add_verb(verbs: "argparse._SubParsersAction[Parser]", name: str, summary: str, module: ModuleType) -> Parser:
    """The parser of a verb or benchmark: its description and example are the docstring of its module."""
    description, example, words = (module.__doc__ or "").partition("Example: ")
    parser = verbs.add_parser(name, help=summary, description=description, epilog=example + words)
    module.add_options(parser)
    return parser


def whole(low: int = 1, high: int = 1_000_000) -> Callable[[str], int]:
    """The type of an option that is a whole number from ``low`` to ``high``."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)

    return read


positive = whole()


def number(text: str) -> float:
    """The type of an option that is a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def report_file(text: str) -> Path:
    """The type of an option for a file to write: where that cannot be is told before the work that it reports on."""
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
    if os.path.isdir(path) or not (there == path or os.path.isdir(there)) or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: name a file in a folder of your own")
    return path


def number_of_samples(text: str) -> int | str:
    """The type of ``--samples``: a number from 1 on, or "auto"."""
    if text == "auto":
        return text
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, or auto, not {text!r}")
    return int(text)


def add_files(parser: Parser) -> None:
    """FILE ..., images and folders of them."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JPEG, PNG, WebP, BMP, or a folder of them")


def add_pipeline(parser: Parser, **bundle: Any) -> None:
    """--bundle, --runtime and --threads, for `load_pipeline`.

    Args:
        bundle: what ``add_argument`` is told of ``--bundle`` beyond its type.
    """
    parser.add_argument("--bundle", type=Path, **{"help": "the folder that mlvgm export wrote", **bundle})
    add_engines(parser)


def add_engines(parser: Parser, threads: str = "CPU threads of the engines (default: every core)") -> None:
    """--runtime and --threads."""
    parser.add_argument("--runtime", choices=runtimes.NAMES, default="auto", help="(default: %(default)s)")
    add_threads(parser, threads)


def add_threads(parser: Parser, text: str = "CPU threads (default: every core)") -> None:
    """--threads; 0 where it is not given."""
    parser.add_argument("--threads", type=whole(0, 1024), default=0, help=text)


def load_pipeline(args: argparse.Namespace) -> "Pipeline":
    """The pipeline of ``--bundle``, ready to run."""
    from handlers.pipeline import Pipeline

    return Pipeline.load(args.bundle, args.runtime, args.threads)


def add_request(parser: Parser, whose: str = "the bundle's") -> None:
    """--samples and --alphas, for `request`."""
    parser.add_argument("--samples", type=number_of_samples, help=f"samples that vote, or auto (default: {whose})")
    parser.add_argument("--alphas", metavar="NAME", help=f"schedule of interpolation weights (default: {whose})")


def request(args: argparse.Namespace) -> dict[str, Any]:
    """What those options ask for, by the names that requests have for it; None is up to the bundle."""
    return {name: getattr(args, name) for name in ("samples", "alphas", "top_k", "seed") if hasattr(args, name)}


def add_models(parser: Parser, purifier: bool = True, **recipe: Any) -> None:
    """--recipe, --purifier and --classifier, for `read_recipe` and `export.models.load_models`.

    Args:
        recipe: what ``add_argument`` is told of ``--recipe``.
    """
    made_from = {"help": "name or YAML file (default: the one the bundle was made from)"}
    parser.add_argument("--recipe", **{**made_from, **recipe})
    if purifier:
        parser.add_argument("--purifier", type=Path, help="its checkpoint, where the recipe names none")
    parser.add_argument("--classifier", type=Path, help="its checkpoint or ONNX file, where the recipe names none")


def read_recipe(args: argparse.Namespace, manifest: "Manifest") -> "Recipe":
    """The recipe of ``--recipe``, or the built-in one that a bundle was made from.

    Raises:
        CliError: the bundle does not say which, or names one that is not built in, or the recipe is another one.
    """
    from mlvgm.recipe import Recipe, RecipeError

    name = args.recipe or manifest.source.get("recipe")
    if name is None:
        raise CliError(f"the bundle {manifest.name} does not say what recipe it was made from: name it with --recipe")
    try:
        recipe = Recipe.read(str(name))
    except RecipeError as error:
        if args.recipe:
            raise
        raise CliError(f"the bundle was made from the recipe {name}: name its file with --recipe FILE") from error
    made = (*manifest.image_size, manifest.n_latents, len(manifest.classes))
    if made != (recipe.image_size, recipe.image_size, recipe.n_latents, len(recipe.classes)):
        raise CliError(
            f"the bundle {manifest.name} was not made from the recipe {recipe.name}: name its own with --recipe"
        )
    return recipe


def add_report(parser: Parser) -> None:
    """--json, the file of a report."""
    parser.add_argument("--json", type=report_file, metavar="FILE", help="for the report; .md and .png go beside it")


def add_port(parser: "argparse._ActionsContainer", text: str) -> None:
    """--port, the first of those that a server takes."""
    parser.add_argument("--port", type=whole(1, 65_531), default=8080, help=f"{text} (%(default)s)")


def add_store(parser: Parser) -> None:
    """--model-store."""
    store = Path("model_store")
    parser.add_argument("--model-store", type=Path, default=store, help="folder of archives (%(default)s)")


def add_rows(parser: Parser) -> None:
    """--json, a line for each image."""
    parser.add_argument("--json", action="store_true", help="print one JSON object per image, one a line")


def add_pngs(parser: Parser, name: str) -> None:
    """--out and --overwrite, for the PNGs of `mlvgm.cli.bulk.Bulk`, called like "purified"."""
    parser.add_argument("--out", type=Path, default=Path(name), metavar="DIR", help="for the PNGs (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="make again what is there already")
