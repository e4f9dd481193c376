"""Print the trtexec command lines of every stage at every batch size of the bundle's profile.

They are run where trtexec is on PATH.

Example: mlvgm bench trtexec build/road-signs --json build/trtexec.json
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from mlvgm.cli.options import Parser


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for engines and times (default: BUNDLE-trtexec)")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Any, None]:
    """Run the lines where that is possible; returns the content of the report and its page."""
    from benchmarks import trtexec
    from evaluation.progress import say

    # Beside the bundle, not inside: a bundle holds only the files that its manifest lists.
    work = args.work or args.bundle.resolve().with_name(f"{args.bundle.resolve().name}-trtexec")
    if shutil.which(trtexec.PROGRAM) is None:
        say("trtexec is not on PATH: nothing is run")
    return {"rows": trtexec.measure(args.bundle, work, say)}, trtexec.markdown, None
