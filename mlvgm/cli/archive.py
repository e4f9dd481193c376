"""Pack a bundle, with the server code and settings, into one archive for TorchServe; it is checked first.

Or put its single graph (mlvgm export --single-graph) into a model repository for a server without Python.

Example: mlvgm archive build/road-signs --out model_store. Or: mlvgm archive build/road-signs --format triton --out
model_repository
"""

import argparse
import dataclasses
from pathlib import Path

from deploy.errors import CliError
from export.archive import FORMATS, QUEUED_CALLS, ArchiveSettings, build_archive
from mlvgm.cli.options import Parser, add_engines, whole

_NUMBERS = (  # option, field of the settings, unit, help
    ("--batch-size", "batch_size", "N", "requests answered together (default: as many as fill an engine)"),
    ("--batch-delay", "batch_delay_ms", "MS", "how long a request waits for others to join its batch (%(default)s)"),
    ("--queue", "queue", "N", f"requests that may wait (default: {QUEUED_CALLS} full calls of an engine)"),
    ("--max-wait", "max_wait_s", "S", "refuse requests queued for longer; needs X-Request-Start (%(default)s)"),
    ("--response-timeout", "response_timeout_s", "S", "restart a worker whose batch takes longer (%(default)s)"),
    ("--certify-draws", "certify_draws", "N", "noisy images a request, for clients' certificates (%(default)s: none)"),
    ("--certify-sigma", "certify_sigma", "S", "standard deviation of their noise (%(default)s)"),
    ("--certify-alpha", "certify_alpha", "A", "probability that a certificate is wrong (%(default)s)"),
)


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("bundle", type=Path, help="the folder that mlvgm export wrote")
    formats = ("torchserve", "triton", "ovms", "kserve")
    add("--format", choices=formats, default="torchserve", help="ovms is OpenVINO Model Server (default: %(default)s)")
    add("--archive-format", choices=FORMATS, default="zip-store", help="of TorchServe's archive (%(default)s)")
    add("--out", type=Path, help="folder for it (model_store, or model_repository for other servers)")
    add("--instances", type=whole(1, 1024), default=1, help="of the single graph (%(default)s)")
    add("--storage-uri", default="", metavar="URI", help="kserve: where the cluster finds the folder")
    add_engines(parser, "CPU threads per worker (default: every core)")
    defaults = ArchiveSettings()
    for option, name, unit, text in _NUMBERS:
        default = getattr(defaults, name)
        add(option, dest=name, type=type(default), default=default, metavar=unit, help=text)
    add(
        "--suspicious",
        choices=("pass", "review", "refuse"),
        default=defaults.suspicious,
        help="what becomes of an image whose attack score is above the threshold that mlvgm tune --score has set: its "
        "answer says so, is marked for review, or is refused (%(default)s)",
    )
    add(
        "--allow-seed",
        action="store_true",
        help="let clients choose the noise, for tests: whoever can do that can search for noise that suits an attack",
    )


def run(args: argparse.Namespace) -> int:
    """Build the archive, or the model's folder in a repository, and say where it is."""
    names = [field.name for field in dataclasses.fields(ArchiveSettings)]
    settings = ArchiveSettings(**{name: value for name, value in vars(args).items() if name in names})
    if args.format == "torchserve":
        if args.instances > 1 or args.storage_uri:
            raise CliError("--instances and --storage-uri are for --format triton, ovms or kserve")
        print(build_archive(args.bundle, args.out or Path("model_store"), settings, args.archive_format))
        return 0
    from export.repository import build_repository

    out = args.out or Path("model_repository")
    print(build_repository(args.bundle, out, args.format, settings, args.instances, args.storage_uri))
    return 0
