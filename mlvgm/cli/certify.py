"""Add noise to an image many times, purify and classify each, and answer with the class that wins.

No change of the image within the radius, in the L2 norm of pixels from 0 to 1, can make this answer another: that holds
but with probability alpha. Prints one JSON object per image, one a line; where no class wins for sure, the image is
abstained from. Exit code 1 when an image could not be read.

Example: mlvgm certify signs/ --bundle build/road-signs --sigma 0.25 --draws 1000 > certified.jsonl
"""

import argparse
import json
from pathlib import Path
from typing import Any

from deploy.errors import CliError
from evaluation.progress import say, track
from handlers.certify import answer
from handlers.image import ImageError, decode
from handlers.pipeline import Pipeline
from mlvgm.cli.options import Parser, add_files, add_pipeline, load_pipeline
from mlvgm.files import named_files, read_file, shown


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add_files(parser)
    add_pipeline(parser, required=True)
    add("--sigma", type=float, default=0.25, help="standard deviation of the noise (%(default)s)")
    add("--draws", type=int, default=1000, metavar="N", help="noisy images that count (%(default)s)")
    add("--alpha", type=float, default=0.001, help="accepted risk, for each image (%(default)s)")
    add("--alphas", help="schedule of interpolation weights (default: the bundle's)")


def run(args: argparse.Namespace) -> int:
    """Certify an image after the other; one that cannot be read does not stop the rest."""
    files = [file for file, _ in named_files(args.files)]
    if not files:
        raise CliError("no image among the files")
    failed = 0
    with load_pipeline(args) as pipeline:
        for file in track(files, "certifying"):
            row = _certify(pipeline, file, args)
            failed += "error" in row
            say(json.dumps(row))
    return 1 if failed else 0


def _certify(pipeline: Pipeline, file: Path, args: argparse.Namespace) -> dict[str, Any]:
    try:
        image = decode(read_file(file), pipeline.manifest.image_size)
    except (ImageError, OSError) as error:
        return {"file": shown(file), "error": (isinstance(error, OSError) and error.strerror) or str(error)}
    certified = pipeline.certify(image[None], args.sigma, args.draws, args.alpha, args.alphas)
    return {"file": shown(file), **answer(certified, 0, pipeline.manifest.classes)}
