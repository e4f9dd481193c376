"""``mlvgm bench``: measurements, one subject a module of this package."""

import argparse
import importlib
import importlib.util

SUBJECTS = ("stages", "server", "trtexec")


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subjects and their arguments."""
    parser = verbs.add_parser(
        "bench",
        help="measure stages and servers",
        description="Measure on this machine. Every report says what it was measured on.",
        epilog="Example: mlvgm bench stages --recipe road-signs --json build/stages.json",
    )
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True)
    for subject in SUBJECTS:
        if importlib.util.find_spec(f"mlvgm.cli.bench_{subject}") is None:
            continue
        module = importlib.import_module(f"mlvgm.cli.bench_{subject}")
        module.add_parser(subjects)
        subjects.choices[subject].set_defaults(subject=module.run)


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for."""
    code: int = args.subject(args)
    return code
