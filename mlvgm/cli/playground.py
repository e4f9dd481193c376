"""Open a page on this machine, to attack pictures and see them purified.

Pick or upload a picture, attack it, and see what is kept of it, the purified samples and their votes. Stays until
Ctrl-C.

Example: mlvgm playground build/road-signs. Or, with the server that mlvgm serve has started: mlvgm playground
"""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.errors import CliError
from deploy.server import port_is_taken
from deploy.signals import Stopped, noted, pause
from handlers.errors import MlvgmError
from handlers.pipeline import Pipeline
from mlvgm.cli.options import Parser, add_engines, add_models, read_recipe, whole
from mlvgm.cli.predict import add_server, find_server
from mlvgm.recipe import Recipe

if TYPE_CHECKING:
    from evaluation.playground import Attacker, Backend


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("bundle", type=Path, nargs="?", help="the folder that mlvgm export wrote (default: a server)")
    add_server(parser)
    add_engines(parser)
    add_models(
        parser, purifier=False, help="whose classifier is attacked (default: the bundle's, or of the model's name)"
    )
    parser.add_argument("--page-port", type=whole(1, 65_535), default=7860, help="of the page (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Load what purifies and what attacks, and serve the page until a signal."""
    if args.bundle and (args.url or args.model):
        raise CliError("name a bundle, or a running server with --url and --model, not both")
    if port_is_taken(args.page_port):
        raise CliError(f"port {args.page_port} is taken: name another one with --page-port")
    with tempfile.TemporaryDirectory(prefix="mlvgm-playground-") as uploads, contextlib.ExitStack() as open_things:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        from evaluation import playground

        purifier, recipe = _purifier(args, open_things)
        attacker: Attacker | None = None
        why_not = ""
        try:
            attacker = _attacker(args, recipe())
        except (MlvgmError, ModuleNotFoundError) as error:
            why_not = str(error)
        page = playground.build(purifier, attacker, why_not)
        with noted(), contextlib.suppress(Stopped):
            print(f"{playground.launch(page, args.page_port)} shows {purifier.name}; Ctrl-C ends it", flush=True)
            while True:
                pause(3600)
        page.close(verbose=False)
    return 0


def _purifier(args: argparse.Namespace, open_things: contextlib.ExitStack) -> "tuple[Backend, Callable[[], Recipe]]":
    """It, and a function that gives the recipe of the classifier behind it."""
    from evaluation.playground import BundleBackend, ServerBackend

    if not args.bundle:
        client, model = find_server(args)
        return ServerBackend(open_things.enter_context(client), model), lambda: Recipe.read(args.recipe or model)
    pipeline = open_things.enter_context(Pipeline.load(args.bundle, args.runtime, args.threads))
    return BundleBackend(pipeline), lambda: read_recipe(args, pipeline.manifest)


def _attacker(args: argparse.Namespace, recipe: Recipe) -> "Attacker":
    from evaluation.playground import Attacker
    from export.models import recipe_classifier

    classifier = recipe_classifier(recipe, args.classifier)
    return Attacker(classifier, recipe.classes, (recipe.image_size, recipe.image_size))
