"""Purify images with a bundle, in this process.

Each PNG holds its answer, so the same command goes on where work was cut off, and prints the answers of all images,
those that were there already among them. An image that cannot be purified is named and the others go on. Exit code 1
when there was one. FILE can be a tar or Parquet file of images as well, and --out one of PNGs.

Example: mlvgm purify signs/ --bundle build/road-signs --out purified --json > answers.jsonl
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handlers.manifest import FILE_NAME, Manifest
from handlers.noise import SEED_BITS
from handlers.pipeline import Pipeline
from handlers.request import parse
from handlers.service import Service
from mlvgm.cli.bulk import Bulk, Row, print_row
from mlvgm.cli.cluster import workers
from mlvgm.cli.containers import pack, parts
from mlvgm.cli.options import Parser, add_files, add_pipeline, add_pngs, add_request, add_rows, request, whole
from mlvgm.files import shown


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add_files(parser)
    add_pipeline(parser, required=True)
    add_pngs(parser, "purified")
    add_request(parser)
    repeatable = "draw the noise from it and each image, so that the same images give the same PNGs; who knows it can "
    repeatable += "prepare attacks (default: fresh noise)"
    parser.add_argument("--seed", type=whole(0, 999_999_999), help=repeatable)
    machines = "work on the machines of this Ray cluster, HOST:PORT or auto, with a process for each --threads cores "
    machines += "(default: 1)"
    parser.add_argument("--ray", metavar="ADDRESS", help=machines)
    add_rows(parser)


def run(args: argparse.Namespace) -> int:
    """Purify a batch after the other, and print what the samples voted for."""
    folder, packed = parts(args.out, args.overwrite), dict[str, str | None]()
    threads = args.threads or 1 if args.ray else args.threads
    make = {"bundle": args.bundle.resolve(), "runtime": args.runtime, "threads": threads, **request(args)}
    with FilePurifier(**make) as purifier:
        job = Bulk(args.files, folder, "purified", purifier.settings, purifier.batch, args.overwrite)
        if folder != args.out:
            job = dataclasses.replace(job, finish=functools.partial(pack, folder, args.out, packed))
        with contextlib.ExitStack() as stack:
            if args.ray:
                rows = job.run_ahead(*stack.enter_context(workers(args.ray, threads, make, purifier.settings)))
            else:
                rows = job.run(purifier.purify)
            failed = 0
            for row in rows:
                failed += "error" in row
                text = ""
                if "error" in row:
                    packed[row["file"]] = row["error"]
                else:
                    name = Path(row["purified"]).relative_to(folder)
                    packed[str(name)], row["purified"] = None, str(args.out / name)
                    text = _text(row)
                print_row(row, args.json, text)
    return 1 if failed else 0


class FilePurifier:
    """Purifies encoded images with the pipeline of a bundle, as its server would.

    Args:
        seed: of a job: the noise of an image depends on it and the image's bytes alone. None for fresh noise.
        options: of a request, such as ``samples``; None stands for the bundle's default.

    Raises:
        BundleError: the bundle cannot be read.
        RequestError: the server would refuse the options.
    """

    def __init__(
        self, bundle: Path, runtime: str = "auto", threads: int = 0, seed: int | None = None, **options: Any
    ) -> None:
        manifest = Manifest.read(bundle)
        given = {name: value for name, value in options.items() if value is not None}
        self._request = parse({"image": b"-", "return": "purified", **given}, {}, manifest, allow_seed=True)
        self._load = functools.partial(Pipeline.load, bundle, runtime, threads)
        self._pipeline: Pipeline | None = None
        self.batch = manifest.batch.opt
        self.settings = {
            "samples": self._request.samples,
            "alphas": self._request.alphas,
            "bundle": hashlib.sha256((bundle / FILE_NAME).read_bytes()).hexdigest(),
            **({} if seed is None else {"seed": seed}),
        }
        self._seed = seed
        logging.getLogger().addHandler(_OneLine())

    def purify(self, images: Sequence[bytes]) -> list[tuple[bytes, Row] | str]:
        """For each image a PNG and the answer, or what is wrong with it."""
        requests = [dataclasses.replace(self._request, images=(image,), seed=self._seed_of(image)) for image in images]
        return [
            (outcome.purified, outcome.content) if outcome.purified else str(outcome.content["error"])
            for (outcome,) in self._service.purify(requests)
        ]

    def _seed_of(self, image: bytes) -> int | None:
        if self._seed is None:
            return None
        digest = hashlib.sha256(b"%d\0%s" % (self._seed, hashlib.sha256(image).digest())).digest()
        return int.from_bytes(digest[:8]) >> (64 - SEED_BITS)

    @functools.cached_property
    def _service(self) -> Service:
        """Loaded at the first image, for there may be none."""
        self._pipeline = self._load()
        return Service(self._pipeline)

    def __enter__(self) -> "FilePurifier":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipeline:
            self._pipeline.close()


def _text(row: Row) -> str:
    flag = f"  flagged: {row['unpurified']['label']} before" if row["flagged"] else ""
    return f"{shown(row['purified'])}  {row['label']}  {row['agreement']:.0%}{flag}"


class _OneLine(logging.Handler):
    """Says on the error stream in a line what the pipeline has to say: the file that it is about is named as well."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            cause = f": {record.exc_info[1]}" if record.exc_info else ""
            print(" ".join(f"{record.getMessage()}{cause}".split()), file=sys.stderr)
