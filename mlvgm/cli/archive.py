"""``mlvgm archive``: pack a bundle into a .mar for TorchServe."""

import argparse
from pathlib import Path

from export.archive import FORMATS, QUEUED_CALLS, Settings, build_archive
from handlers import runtimes


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb's arguments."""
    defaults = Settings()
    parser = subparsers.add_parser(
        "archive",
        help="pack a bundle into a .mar for TorchServe",
        description="Check a bundle and pack it, with the server code and settings, into one archive for TorchServe.",
        epilog="Example: mlvgm archive build/road-signs --out model_store",
    )
    parser.add_argument("bundle", type=Path, help="the folder that mlvgm export wrote")
    parser.add_argument("--out", type=Path, default=Path("model_store"), help="folder for the archive (%(default)s)")
    parser.add_argument(
        "--archive-format",
        choices=list(FORMATS),
        default="zip-store",
        help="zip-store is the fastest to build and start; no-archive is a folder that is not copied at start "
        "(default: %(default)s)",
    )
    parser.add_argument("--runtime", choices=runtimes.NAMES, default=defaults.runtime, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=defaults.threads, help="CPU threads per worker; 0 is every core")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=defaults.batch_size,
        metavar="N",
        help="requests answered together (default: as many as fill an engine)",
    )
    parser.add_argument(
        "--batch-delay",
        type=int,
        default=defaults.batch_delay_ms,
        metavar="MS",
        help="how long a request waits for others to join its batch, 1 or more (%(default)s)",
    )
    parser.add_argument(
        "--queue",
        type=int,
        default=defaults.queue,
        metavar="N",
        help=f"requests that may wait; one more is refused at once (default: {QUEUED_CALLS} full calls of an engine)",
    )
    parser.add_argument(
        "--max-wait",
        type=int,
        default=defaults.max_wait_s,
        metavar="S",
        help="refuse what has waited for longer, where a proxy says when it came (%(default)s)",
    )
    parser.add_argument(
        "--response-timeout",
        type=int,
        default=defaults.response_timeout_s,
        metavar="S",
        help="a batch that takes longer fails, and its worker is started anew (%(default)s)",
    )
    parser.add_argument(
        "--allow-seed",
        action="store_true",
        help="let clients choose the noise, for tests: whoever can do that can search for noise that suits an attack",
    )


def run(arguments: argparse.Namespace) -> int:
    """Build the archive and say where it is."""
    settings = Settings(
        runtime=arguments.runtime,
        threads=arguments.threads,
        allow_seed=arguments.allow_seed,
        batch_size=arguments.batch_size,
        batch_delay_ms=arguments.batch_delay,
        queue=arguments.queue,
        max_wait_s=arguments.max_wait,
        response_timeout_s=arguments.response_timeout,
    )
    archive = build_archive(arguments.bundle, arguments.out, settings, arguments.archive_format)
    print(archive)
    return 0
