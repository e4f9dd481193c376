"""Archive a bundle, start TorchServe with it on free ports of loopback, and measure it.

Images a second, against the same pipeline in process and behind the development server; latency against load; and what
else you ask for.

Example: mlvgm bench server --bundle build/road-signs --hostile 100000 --kills 10 --overload 120 --json
build/server.json
"""

import argparse
import importlib.util
import signal
from functools import partial
from pathlib import Path
from typing import Any

from deploy.workers import chosen
from evaluation.progress import say
from export import archive
from handlers.inputs import checked_samples
from handlers.manifest import Manifest
from mlvgm.cli.options import Parser, add_pipeline, number, number_of_samples, positive, whole


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add_pipeline(parser, required=True)
    add("--hostile", type=whole(0), default=0, metavar="N", help="requests to send, half of them hostile")
    add("--kills", type=whole(0), default=0, metavar="N", help="times to kill the workers under load")
    add("--overload", type=number, default=0, metavar="SECONDS", help="seconds to offer twice the sustainable rate")
    add("--soak", type=number, default=0, metavar="SECONDS", help="seconds to offer half the sustainable rate")
    add("--seconds", type=number, default=10, help="of each load (%(default)s)")
    add("--rounds", type=positive, default=3, help="of each server at saturation (%(default)s)")
    add("--samples", type=number_of_samples, metavar="N", help="of an image, or auto (default: the bundle's)")
    add("--images", type=Path, metavar="FOLDER", help="to send (default: synthetic pictures)")
    add("--batch-size", type=positive, metavar="N", help="images a batch (default: the archive's)")
    add("--batch-delay", type=positive, metavar="MS", help="to wait for a full batch (default: the archive's)")
    add("--workers", type=positive, help="of each server (default: as mlvgm serve)")
    add("--no-dev", action="store_true", help="do not compare with the development server of mlvgm serve --dev")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Any, Any]:
    """Measure; returns the content of the report, its page and its plot."""
    from benchmarks.server import report
    from benchmarks.server.measure import measure
    from benchmarks.server.workload import BenchmarkSettings
    from tests.stress import hostile, kills, overload, soak

    manifest = Manifest.read(args.bundle)
    samples = args.samples or manifest.samples.default
    checked_samples(manifest, samples)
    served = archive.ArchiveSettings(
        runtime=args.runtime,
        allow_seed=True,  # so that every answer can be compared with the correct one
        batch_size=args.batch_size or archive.fitting_batch(manifest, args.runtime),
        batch_delay_ms=args.batch_delay or archive.ArchiveSettings().batch_delay_ms,
    )
    size = sum(path.stat().st_size for path in args.bundle.rglob("*") if path.is_file())
    workers, threads = chosen(args.workers, args.threads, [size])
    dev_server = importlib.util.find_spec("uvicorn") is not None and not args.no_dev
    settings = BenchmarkSettings(
        args.bundle, samples, served, workers, threads, args.images, args.seconds, args.rounds, dev_server
    )
    modules = {"hostile": hostile, "overload": overload, "soak": soak, "kills": kills}
    asked = {name: module for name, module in modules.items() if getattr(args, name)}
    stress = {name: partial(module.run, getattr(args, name)) for name, module in asked.items()}
    sections = {name: module.section for name, module in asked.items()}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, or the folders would be left behind
    content = {"bundle": f"{manifest.name} {manifest.version}", **measure(settings, stress, say)}
    return content, partial(report.markdown, sections=sections), partial(report.plot, sections=sections)
