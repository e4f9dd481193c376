"""``mlvgm bench trtexec``: the command lines that time every stage with NVIDIA's own tool, and what it says."""

import argparse
import shutil
from pathlib import Path


def add_parser(subjects: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the benchmark's arguments."""
    parser = subjects.add_parser(
        "trtexec",
        help="every stage with NVIDIA's trtexec",
        description="Print the trtexec command lines of every stage at every batch size of the bundle's profile, and "
        "run them where trtexec is on PATH.",
        epilog="Example: mlvgm bench trtexec build/road-signs --json build/trtexec.json",
    )
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for the report; .md goes beside it")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for engines and times (default: BUNDLE-trtexec)")


def run(args: argparse.Namespace) -> int:
    """Print the lines or run them, print the table, and write the report."""
    from benchmarks import trtexec
    from evaluation import report
    from evaluation.progress import say

    # Beside the bundle, not inside: what is in a bundle is sealed.
    work = args.work or args.bundle.resolve().with_name(f"{args.bundle.resolve().name}-trtexec")
    rows = trtexec.measure(args.bundle, work, say=say)
    content = {**report.measured_here(), "rows": rows}
    table = trtexec.markdown(content)
    print(table)
    if shutil.which(trtexec.PROGRAM) is None:
        print("trtexec is not on PATH: nothing was run")
    if args.json:
        report.save(content, table, args.json)
    return 0
