"""``mlvgm doctor``: what serving needs, what of it is there, and how to cure the rest."""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cli.errors import CliError
from cli.java import find_java
from cli.server import DEPLOY, INSTALL, Server, port_is_taken
from handlers import runtimes
from handlers.client import ServerError


@dataclass(frozen=True)
class Finding:
    """One check: a line on what was found and, unless all is well, the cure. A warning does not keep from serving."""

    name: str
    found: str
    cure: str = ""
    is_warning: bool = False


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb's arguments."""
    parser = subparsers.add_parser(
        "doctor",
        help="check what serving needs, and say how to cure what fails",
        description="Check Python, Java, TorchServe, the runtimes, ports, folders and keys. Exit code 1 if one fails.",
        epilog="Example: mlvgm doctor --port 8080 --model-store model_store",
    )
    parser.add_argument("--port", type=int, default=8080, help="the port to serve on (%(default)s)")
    parser.add_argument(
        "--model-store", type=Path, default=Path("model_store"), help="folder of archives (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print every finding; 1 if serving would fail."""
    server = Server(arguments.port)
    checks: list[Callable[[], Finding]] = [
        _python,
        _java,
        lambda: _package("torchserve", "0.12", INSTALL),
        lambda: _package("torch-model-archiver", "0.12", INSTALL),
        lambda: _package("pillow", "10.3", "pip install 'pillow>=10.3'"),
        _runtimes,
        _settings,
        lambda: _store(arguments.model_store),
        lambda: _folder(server),
        lambda: _ports(server),
        lambda: _keys(server),
    ]
    failed = 0
    for check in checks:
        finding = check()
        mark = "ok  " if not finding.cure else "warn" if finding.is_warning else "FAIL"
        failed += mark == "FAIL"
        print(f"{mark}  {finding.name:20}  {finding.found}")
        if finding.cure:
            print(f"{'':26}  -> {finding.cure}")
    return 1 if failed else 0


def _python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable})"
    return Finding("Python", found, "" if sys.version_info >= (3, 10) else "install Python 3.10 or newer")


def _java() -> Finding:
    try:
        java = find_java()
    except CliError as error:
        return Finding("Java", "none that TorchServe can use", str(error))
    return Finding("Java", f"{java.version} from {java.source} ({java.home})")


def _package(name: str, oldest: str, cure: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", cure)
    return Finding(name, version, "" if _numbers(version) >= _numbers(oldest) else cure)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2] if part.isdigit()]


def _runtimes() -> Finding:
    found = runtimes.available()
    if not found:
        return Finding("runtimes", "none", "pip install onnxruntime or pip install openvino")
    return Finding("runtimes", f"{', '.join(found)}; auto takes {runtimes.choose('auto')}")


def _settings() -> Finding:
    missing = [name for name in ("config.properties", "log4j2.xml") if not (DEPLOY / name).is_file()]
    cure = f"serve from a checkout: {DEPLOY} lacks {', '.join(missing)}" if missing else ""
    return Finding("settings", str(DEPLOY), cure)


def _store(store: Path) -> Finding:
    archives = sorted(path.name for path in store.glob("*.mar"))
    cure = "" if archives else f"mlvgm export, then mlvgm archive BUNDLE --out {store}"
    return Finding("model store", f"{store}: {', '.join(archives) or 'no archive'}", cure, is_warning=True)


def _folder(server: Server) -> Finding:
    """The first folder upwards that exists must take new ones."""
    existing = next(path for path in (server.folder, *server.folder.parents) if path.exists())
    writable = os.access(existing, os.W_OK | os.X_OK)
    cure = "" if writable else "set MLVGM_STATE to a folder that you may write in"
    return Finding("server folder", f"{server.folder} {'can' if writable else 'cannot'} be written", cure)


def _ports(server: Server) -> Finding:
    if server.process():
        return Finding("ports", f"a server of ours is running on {server.port}")
    ports = range(server.port, server.port + 5)
    taken = [str(port) for port in ports if port_is_taken(port)]
    if taken:
        return Finding("ports", f"{', '.join(taken)} taken", "mlvgm serve --port N with five free ports in a row")
    return Finding("ports", f"{ports.start} to {ports.stop - 1} are free")


def _keys(server: Server) -> Finding:
    if not server.process():
        return Finding("key file", "none, as no server is running")
    try:
        server.client().key("inference")
    except ServerError as error:
        return Finding("key file", str(error), "restart the server: mlvgm serve --stop, then mlvgm serve")
    others = server.key_file.stat().st_mode & 0o077
    cure = f"chmod 600 {server.key_file}" if others else ""
    return Finding("key file", f"{server.key_file} is {'readable by others' if others else 'private'}", cure)
