"""Start TorchServe on loopback, keys required, wait until it really answers, and stay until Ctrl-C.

Example: mlvgm serve --models road-signs.mar --detach, and later: mlvgm serve --stop
"""

import argparse
import contextlib
import functools
import sys
import time
from pathlib import Path

from deploy.errors import CliError
from deploy.server import Server
from deploy.signals import Stopped, noted, pause
from deploy.torchserve import TorchServe
from deploy.workers import chosen, gpus_for, sizes_of
from mlvgm.cli.options import Parser, add_port, add_store, add_threads, number, positive


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--dev", type=Path, metavar="BUNDLE", help="serve this bundle in this process: no Java, archive or keys")
    add_store(parser)
    add("--models", nargs="+", metavar="NAME.mar", help="archives in the store to serve (default: the only one there)")
    add_port(parser, "of inference; the four after it are taken as well")
    add("--workers", type=positive, help="per model, each with a copy of it (default: by cores, memory and its size)")
    add_threads(parser, "of each worker (default: its share of the cores)")
    add("--timeout", type=number, default=600, metavar="S", help="to wait for an answer (%(default)s)")
    add("--detach", action="store_true", help="return once the server answers")
    add("--stop", action="store_true", help="stop the server of this port")


def run(args: argparse.Namespace) -> int:
    """Start, stay and stop; or with --detach and --stop one of these alone."""
    if args.dev:
        if args.detach or args.stop or args.workers or args.models:
            raise CliError("--dev serves one bundle in this process: it takes --port and --threads alone")
        from deploy import dev_server

        return dev_server.serve(args.dev, args.port, threads=args.threads)
    if args.stop:
        stopped = Server(args.port).stop()
        print("stopped" if stopped else f"no server is running on port {args.port}", flush=True)
        return 0 if stopped else 1
    archives = _archives(args.model_store, args.models)
    with noted(), contextlib.suppress(Stopped):
        return _serve(args, archives)
    return 0


def _serve(args: argparse.Namespace, archives: list[Path]) -> int:
    server = TorchServe(args.port, detached=args.detach)
    say = functools.partial(print, file=sys.stderr, flush=True)
    say(f"starting {', '.join(path.name for path in archives)} on {server.url} ...")
    started = time.monotonic()
    workers, threads = chosen(args.workers, args.threads, sizes_of(archives), gpus_for(archives))
    server.start(archives, workers, args.timeout, threads, say)
    say(f"ready after {time.monotonic() - started:.1f} s; log: {server.log}")
    key = server.client().key("inference")
    for model in server.models:
        print(f"curl -T IMAGE.png -H 'Authorization: Bearer {key}' {server.url}/predictions/{model}", flush=True)
    return 0 if args.detach else _stay(server)


def _archives(store: Path, names: list[str] | None) -> list[Path]:
    if not store.is_dir():
        raise CliError(f"{store}: no such folder; build an archive with mlvgm archive BUNDLE --out {store}")
    if names:
        if outside := [name for name in names if Path(name).name != name]:
            raise CliError(f"--models takes names of archives in {store}, not the path {outside[0]}")
        return [store / name for name in names]
    found = sorted(store.glob("*.mar"))
    if len(found) != 1:
        held = ", ".join(path.name for path in found) or "none; build one with mlvgm archive BUNDLE"
        raise CliError(f"{store}: say with --models which archives to serve (there: {held})")
    return found


def _stay(server: TorchServe) -> int:
    """Wait for a signal, then stop the server."""
    print("Ctrl-C stops the server", file=sys.stderr, flush=True)
    try:
        while not server.ended():
            pause(0.5)
        raise CliError(f"TorchServe has ended by itself; its log is {server.log}")
    finally:
        server.stop()
