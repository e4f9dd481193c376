"""Measure on this machine. Every report says what it was measured on.

Example: mlvgm bench stages --recipe road-signs --json build/stages.json
"""

import argparse
import importlib
import sys

from deploy.errors import CliError
from deploy.server import IN_CHECKOUT, PROJECT
from mlvgm.cli.options import Parser, add_report, add_verb

BENCHMARKS = {
    "stages": "the pipeline by technique, stage by stage",
    "server": "a bundle on TorchServe: load, hostile requests, kills, overload",
    "trtexec": "every stage with NVIDIA's trtexec",
    "vote": "samples: auto against the maximum",
}


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    if not IN_CHECKOUT:
        parser.add_argument("benchmark", nargs=argparse.REMAINDER, help="in a checkout: " + ", ".join(BENCHMARKS))
        return
    benchmarks = parser.add_subparsers(metavar="BENCHMARK", required=True)
    for benchmark, summary in BENCHMARKS.items():
        module = importlib.import_module(f"mlvgm.cli.bench_{benchmark}")
        own = add_verb(benchmarks, benchmark, summary, module)
        add_report(own)
        own.set_defaults(benchmark=module.run)


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for, print the report, and write it.

    Raises:
        CliError: the benchmarks are not here, for a wheel does not hold them.
    """
    if not IN_CHECKOUT:
        raise CliError("the benchmarks are not in the wheel: run this in a checkout, after pip install -e .")
    sys.path.insert(0, str(PROJECT))  # where the folders benchmarks and tests lie; they are not installed
    from evaluation import report

    content, markdown, plot = args.benchmark(args)
    content = report.measured_here() | content
    page = markdown(content)
    print(f"\n{page}")
    if args.json:
        report.save(content, page, args.json, plot and (lambda file: plot(content, file)))
    return 0
