"""``mlvgm bench server``: what a bundle on TorchServe stands."""

import argparse
import importlib.util
import signal
from pathlib import Path

from deploy.errors import CliError
from deploy.workers import chosen
from mlvgm.cli.options import add_pipeline, add_report, number, number_of_samples, positive, whole


def add_parser(subjects: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the benchmark's arguments."""
    parser = subjects.add_parser(
        "server",
        help="a bundle on TorchServe: load, hostile requests, kills, overload",
        description="Archive a bundle, start TorchServe with it on free ports of loopback, and measure: images a "
        "second against the same pipeline in process and behind the development server, latency against load, and "
        "what else you ask for.",
        epilog="Example: mlvgm bench server --bundle build/road-signs --hostile 100000 --kills 10 --overload 120 "
        "--json build/server.json",
    )
    add_pipeline(parser, required=True)
    for option, unit, kind, text in (
        ("--hostile", "N", whole(0), "requests to send, half of them hostile"),
        ("--kills", "N", whole(0), "times to kill the workers under load"),
        ("--overload", "SECONDS", number, "seconds to offer twice the sustainable rate"),
        ("--soak", "SECONDS", number, "seconds to offer half the sustainable rate"),
    ):
        parser.add_argument(option, type=kind, default=0, metavar=unit, help=text)
    add_report(parser)
    parser.add_argument("--seconds", type=number, default=10, help="of each load (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="of each server at saturation (%(default)s)")
    parser.add_argument(
        "--samples", type=number_of_samples, metavar="N", help="of an image, or auto (default: the bundle's)"
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="to send (default: synthetic pictures)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images a batch (default: the archive's)")
    parser.add_argument(
        "--batch-delay", type=positive, metavar="MS", help="to wait for a full batch (default: the archive's)"
    )
    parser.add_argument("--workers", type=positive, help="of each server (default: as mlvgm serve)")
    parser.add_argument(
        "--no-dev", action="store_true", help="do not compare with the development server of mlvgm serve --dev"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the report, and write it."""
    from benchmarks.server import measure
    from benchmarks.server import report as page
    from benchmarks.server.workload import WorkloadSettings
    from evaluation import report
    from evaluation.progress import say
    from export import archive
    from handlers.manifest import AUTO, Manifest

    manifest = Manifest.read(args.bundle)
    samples = args.samples or manifest.samples.default
    if samples != AUTO and int(samples) > manifest.samples.max:
        raise CliError(f"--samples must be 1 to {manifest.samples.max} or {AUTO!r} with this bundle")
    defaults = archive.Settings()
    served = archive.Settings(
        runtime=args.runtime,
        allow_seed=True,  # so that every answer can be compared with the right one
        batch_size=args.batch_size or archive.fitting_batch(manifest, args.runtime),
        batch_delay_ms=args.batch_delay or defaults.batch_delay_ms,
    )
    compare = importlib.util.find_spec("uvicorn") is not None and not args.no_dev
    plan = measure.Plan(args.seconds, args.rounds, compare, args.hostile, args.kills, args.overload, args.soak)
    settings = WorkloadSettings(args.bundle, samples, served.batch_size, args.runtime, images=args.images)
    size = sum(path.stat().st_size for path in args.bundle.rglob("*") if path.is_file())
    workers, threads = chosen(args.workers, args.threads, [size])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, or the folders would be left behind
    content = {
        "bundle": f"{manifest.name} {manifest.version}",
        **report.measured_here(),
        **measure.measure(settings, served, workers, threads, plan, say),
    }
    text = page.markdown(content)
    print(f"\n{text}")
    if args.json:
        report.save(content, text, args.json, lambda file: page.plot(content, file))
    return 0
