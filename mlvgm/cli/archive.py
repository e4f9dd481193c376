"""``mlvgm archive``: pack a bundle into a .mar for TorchServe."""

import argparse
import dataclasses
from pathlib import Path

from export.archive import FORMATS, QUEUED_CALLS, Settings, build_archive
from mlvgm.cli.options import add_engines

_NUMBERS = (  # option, field of the settings, unit, help
    ("--batch-size", "batch_size", "N", "requests answered together (default: as many as fill an engine)"),
    ("--batch-delay", "batch_delay_ms", "MS", "how long a request waits for others to join its batch (%(default)s)"),
    ("--queue", "queue", "N", f"requests that may wait (default: {QUEUED_CALLS} full calls of an engine)"),
    (
        "--max-wait",
        "max_wait_s",
        "S",
        "refuse requests queued for longer; needs X-Request-Start from the proxy (%(default)s)",
    ),
    ("--response-timeout", "response_timeout_s", "S", "restart a worker whose batch takes longer (%(default)s)"),
    ("--certify-draws", "certify_draws", "N", "noisy images a request, for clients' certificates (%(default)s: none)"),
    ("--certify-sigma", "certify_sigma", "S", "standard deviation of their noise (%(default)s)"),
    ("--certify-alpha", "certify_alpha", "A", "probability that a certificate is wrong (%(default)s)"),
)


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb's arguments."""
    parser = verbs.add_parser(
        "archive",
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
    for option, name, unit, text in _NUMBERS:
        default = getattr(defaults, name)
        parser.add_argument(option, dest=name, type=type(default), default=default, metavar=unit, help=text)
    parser.add_argument(
        "--suspicious",
        choices=("pass", "review", "refuse"),
        default=defaults.suspicious,
        help="what becomes of an image whose attack score is above the threshold that mlvgm tune --score has set: its "
        "answer says so, is marked for review, or is refused (%(default)s)",
    )
    parser.add_argument(
        "--allow-seed",
        action="store_true",
        help="let clients choose the noise, for tests: whoever can do that can search for noise that suits an attack",
    )


def run(args: argparse.Namespace) -> int:
    """Build the archive and say where it is."""
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: value for name, value in vars(args).items() if name in names})
    print(build_archive(args.bundle, args.out, settings, args.archive_format))
    return 0
