"""``mlvgm serve``: start TorchServe on loopback, keys required, and stop it again."""

import argparse
import sys
import time
from pathlib import Path

from deploy.errors import CliError
from deploy.server import Server
from deploy.signals import Stopped, noted, pause
from deploy.torchserve import TorchServe
from deploy.workers import chosen, sizes_of


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb's arguments."""
    parser = subparsers.add_parser(
        "serve",
        help="start TorchServe on loopback with an archive",
        description="Start TorchServe on loopback, keys required, wait until it really answers, and stay until Ctrl-C.",
        epilog="Example: mlvgm serve --models road-signs.mar --detach, and later: mlvgm serve --stop",
    )
    parser.add_argument(
        "--dev", type=Path, metavar="BUNDLE", help="serve this bundle in this process: no Java, archive or keys"
    )
    parser.add_argument(
        "--model-store", type=Path, default=Path("model_store"), help="folder of archives (%(default)s)"
    )
    parser.add_argument(
        "--models", nargs="+", metavar="NAME.mar", help="archives in the store to serve (default: the only one there)"
    )
    parser.add_argument(
        "--port", type=int, default=8080, help="of inference; the four after it are taken as well (%(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="per model, each with a copy of it in memory (default: as cores, memory and the size of the model "
        "suggest, docs/metrics.md)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="of each worker (default: the cores shared out among --workers)"
    )
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="to wait for an answer (%(default)s)")
    parser.add_argument("--detach", action="store_true", help="return once the server answers")
    parser.add_argument("--stop", action="store_true", help="stop the server of this port")


def run(arguments: argparse.Namespace) -> int:
    """Start, stay and stop; or with --detach and --stop one of these alone."""
    if not 1 <= arguments.port <= 65531:
        raise CliError("--port must be 1 to 65531: the server needs the four ports after it too")
    if arguments.workers is not None and arguments.workers < 1:
        raise CliError("--workers must be 1 or more")
    if arguments.threads < 0:
        raise CliError("--threads must be 1 or more, or 0 to share the cores out")
    if arguments.dev:
        return _serve_dev(arguments)
    if arguments.stop:
        stopped = Server(arguments.port).stop()
        print("stopped" if stopped else f"no server is running on port {arguments.port}", flush=True)
        return 0 if stopped else 1
    archives = _archives(arguments.model_store, arguments.models)
    with noted():
        try:
            return _serve(arguments, archives)
        except Stopped:
            return 0


def _serve_dev(arguments: argparse.Namespace) -> int:
    try:
        from deploy import dev_server
    except ModuleNotFoundError as error:
        raise CliError(f"--dev needs {error.name}: pip install starlette uvicorn") from None
    return dev_server.serve(arguments.dev, arguments.port, threads=arguments.threads)


def _serve(arguments: argparse.Namespace, archives: list[Path]) -> int:
    server = TorchServe(arguments.port, detached=arguments.detach)
    print(f"starting {', '.join(path.name for path in archives)} on {server.url} ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    workers, threads = chosen(arguments.workers, arguments.threads, sizes_of(archives))
    server.start(archives, workers, arguments.timeout, threads, _tell)
    print(f"ready after {time.monotonic() - started:.1f} s; log: {server.log}", file=sys.stderr)
    for model in server.models:
        print(_curl(server, model), flush=True)
    return 0 if arguments.detach else _stay(server)


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


def _tell(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


def _curl(server: Server, model: str) -> str:
    """What to type."""
    key = server.client().key("inference")
    return f"curl -T IMAGE.png -H 'Authorization: Bearer {key}' {server.url}/predictions/{model}"


def _stay(server: TorchServe) -> int:
    """Wait for a signal, then stop the server."""
    print("Ctrl-C stops the server", file=sys.stderr, flush=True)
    try:
        while not server.ended():
            pause(0.5)
        raise CliError(f"TorchServe has ended by itself; its log is {server.log}")
    finally:
        server.stop()
