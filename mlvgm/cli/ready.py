"""``mlvgm ready``: whether a server really answers, for probes. TorchServe's own health check says yes too early."""

import argparse

from deploy.readiness import check
from deploy.server import Server


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb's arguments."""
    parser = subparsers.add_parser(
        "ready",
        help="check that a running server answers, for probes",
        description="Ask the server that mlvgm serve started for one purified sample of a grey image. Exit code 0 when "
        "every model answers, or its queue is full while its workers compute; else 1.",
        epilog="Example: mlvgm ready --port 8080 --model road-signs",
    )
    parser.add_argument("--model", help="which model (default: all that are served)")
    parser.add_argument("--port", type=int, default=8080, help="of the server (%(default)s)")
    parser.add_argument("--timeout", type=float, default=15, metavar="S", help="to wait for an answer (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each model; 1 unless all are ready."""
    server = Server(arguments.port)
    models = [arguments.model] if arguments.model else server.models
    if not models:
        print(f"no server of mlvgm serve is running on port {server.port}")
    found = []
    for model in models:
        finding = check(server, model, arguments.timeout)
        print(f"{model}: {finding.words}")
        found.append(finding.ready)
    return 0 if found and all(found) else 1
