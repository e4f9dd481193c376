"""``mlvgm purify``: purify image files in bulk, without a server."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.errors import CliError
from mlvgm.cli.files import with_targets

if TYPE_CHECKING:
    from handlers.pipeline import Pipeline


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb's arguments."""
    parser = verbs.add_parser(
        "purify",
        help="purify a folder of images in bulk",
        description="Purify images with a bundle, in this process. What was written before is left as it is, so that "
        "work that was cut off goes on where it stopped. Exit code 1 when an image was refused.",
        epilog="Example: mlvgm purify signs/ --bundle build/road-signs --out purified --json > answers.jsonl",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JPEG, PNG, WebP, BMP, or a folder of them")
    parser.add_argument("--bundle", type=Path, required=True, help="the folder that mlvgm export wrote")
    parser.add_argument("--out", type=Path, default=Path("purified"), metavar="DIR", help="for the PNGs (%(default)s)")
    parser.add_argument("--samples", type=int, help="purified copies that vote (default: the bundle's)")
    parser.add_argument("--alphas", help="schedule of interpolation weights (default: the bundle's)")
    parser.add_argument("--runtime", default="auto", help="see mlvgm doctor (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="purify again what is there already")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image, one a line")


def run(args: argparse.Namespace) -> int:
    """Purify a batch after the other, and print what the copies voted for."""
    from handlers.pipeline import Pipeline

    pairs = list(with_targets(args.files, args.out))
    todo = [(source, target) for source, target in pairs if args.overwrite or not target.exists()]
    if not pairs:
        raise CliError("no image to purify")
    if len(todo) < len(pairs):
        print(f"{len(pairs) - len(todo)} of {len(pairs)} images are there already", file=sys.stderr)
    if not todo:
        return 0
    refused, done, begun = 0, 0, time.monotonic()
    with Pipeline.load(args.bundle, runtime=args.runtime) as pipeline:
        step = pipeline.manifest.batch.opt
        for some in (todo[start : start + step] for start in range(0, len(todo), step)):
            for answer in _purify(pipeline, some, args):
                refused += "error" in answer
                _print(answer, args.json)
            done += len(some)
            left = (time.monotonic() - begun) / done * (len(todo) - done)
            print(f"{done}/{len(todo)}, {left:.0f} s left", file=sys.stderr, flush=True)
    return 1 if refused else 0


def _purify(
    pipeline: "Pipeline", pairs: Sequence[tuple[Path, Path]], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The answers about some files, whose purified images are written first."""
    import numpy as np

    from handlers.image import ImageError, decode, encode_png

    images, known = [], []
    for source, target in pairs:
        try:
            images.append(decode(source.read_bytes(), pipeline.manifest.image_size))
            known.append((source, target))
        except (ImageError, OSError) as error:
            yield {"file": str(source), "error": (isinstance(error, OSError) and error.strerror) or str(error)}
    if not known:
        return
    result = pipeline.run(np.stack(images), samples=args.samples, alphas=args.alphas)
    for i, (source, target) in enumerate(known):
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written aside, then moved: a file that is there is whole.
        draft = target.with_suffix(".part")
        draft.write_bytes(encode_png(result.representative(i)))
        draft.replace(target)
        yield {
            "file": str(source),
            "purified": str(target),
            "label": pipeline.manifest.classes[result.labels[i]],
            "agreement": round(float(result.agreement[i]), 4),
            "unpurified": pipeline.manifest.classes[result.unpurified_labels[i]],
            "flagged": bool(result.flagged[i]),
        }


def _print(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer), flush=True)
    elif "error" in answer:
        print(f"{answer['file']}: {answer['error']}", file=sys.stderr)
    else:
        flag = f"  flagged: read as {answer['unpurified']} before" if answer["flagged"] else ""
        print(f"{answer['purified']}  {answer['label']}  {answer['agreement']:.0%}{flag}", flush=True)
