"""``mlvgm archive``: pack a bundle into a .mar for TorchServe."""

import argparse
import dataclasses
from pathlib import Path

from export.archive import FORMATS, QUEUED_CALLS, Settings, build_archive
from mlvgm.cli.options import add_engines


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb's arguments."""
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
    add_engines(parser, help="CPU threads per worker (default: every core)")
    defaults = Settings()
    for option, name, unit, text in (
        ("--batch-size", "batch_size", "N", "requests answered together (default: as many as fill an engine)"),
        (
            "--batch-delay",
            "batch_delay_ms",
            "MS",
            "a request waits for others to join its batch (%(default)s)",
        ),
        ("--queue", "queue", "N", f"requests that may wait (default: {QUEUED_CALLS} full calls of an engine)"),
        (
            "--max-wait",
            "max_wait_s",
            "S",
            "refuse what waited longer, where a proxy says when it came (%(default)s)",
        ),
        ("--response-timeout", "response_timeout_s", "S", "restart a worker whose batch takes longer (%(default)s)"),
    ):
        parser.add_argument(option, dest=name, type=int, default=getattr(defaults, name), metavar=unit, help=text)
    parser.add_argument(
        "--suspicious",
        choices=("pass", "review", "refuse"),
        default=defaults.suspicious,
        help="what becomes of an image whose attack score is above the threshold that mlvgm tune --score has set: its "
        "answer says so, is marked for review, or is refused (%(default)s)",
    )
    parser.add_argument(
        "--certify-draws",
        type=int,
        default=defaults.certify_draws,
        metavar="N",
        help="let clients ask for certificates of so many noisy images a request; they cost as many samples "
        "(%(default)s: none)",
    )
    parser.add_argument(
        "--certify-sigma", type=float, default=defaults.certify_sigma, metavar="S", help="of their noise (%(default)s)"
    )
    parser.add_argument(
        "--certify-alpha", type=float, default=defaults.certify_alpha, metavar="A", help="their risk (%(default)s)"
    )
    parser.add_argument(
        "--allow-seed",
        action="store_true",
        help="let clients choose the noise, for tests: whoever can do that can search for noise that suits an attack",
    )


def run(arguments: argparse.Namespace) -> int:
    """Build the archive and say where it is."""
    names = [field.name for field in dataclasses.fields(Settings)]
    given = {name: value for name, value in vars(arguments).items() if name in names}
    archive = build_archive(arguments.bundle, arguments.out, Settings(**given), arguments.archive_format)
    print(archive)
    return 0
