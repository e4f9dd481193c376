"""Ask the server that mlvgm serve started for one purified sample of a grey image.

Exit code 0 when every model answers, or its queue is full while its workers compute; else 1.

Example: mlvgm ready --port 8080 --model road-signs
"""

import argparse

from deploy.readiness import check
from deploy.server import Server
from mlvgm.cli.options import Parser, add_port, number


def add_options(parser: Parser) -> None:
    """Declare the args."""
    parser.add_argument("--model", help="which model (default: all that are served)")
    add_port(parser, "of the server")
    parser.add_argument("--timeout", type=number, default=15, metavar="S", help="to wait for an answer (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print a line for each model; 1 unless all are ready."""
    server = Server(args.port)
    models = [args.model] if args.model else server.models
    if not models:
        print(f"no server of mlvgm serve is running on port {server.port}")
    found = []
    for model in models:
        finding = check(server, model, args.timeout)
        print(f"{model}: {finding.words}")
        found.append(finding.ready)
    return 0 if found and all(found) else 1
