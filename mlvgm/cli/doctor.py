"""Check Python, Java, TorchServe, the runtimes, ports, folders and keys. Exit code 1 if one fails.

Example: mlvgm doctor --port 8080 --model-store model_store
"""

import argparse
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deploy import model_archive
from deploy.errors import CliError
from deploy.java import find_java
from deploy.server import Server, grey_png, port_is_taken
from deploy.torchserve import INSTALL
from handlers import packages, runtimes
from handlers.errors import MlvgmError
from handlers.reply import ServerError
from handlers.runtimes import cache
from mlvgm.cli.options import Parser, add_port, add_store

_NEEDED = {"numpy": "1.26", "pillow": "10.3", "pyyaml": "6"}  # by every worker
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_PATIENCE_S = 60
_SPARE_BYTES = 500_000_000  # for logs, uploads and sockets


@dataclass(frozen=True)
class Finding:
    """One check: a line on what was found and, unless all is well, the cure. A warning does not keep from serving."""

    name: str
    found: str
    cure: str = ""
    is_warning: bool = False


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add_port(parser, "the port to serve on")
    add_store(parser)
    parser.add_argument("--bundle", type=Path, help="also say which runtime auto is for it; measure it where unknown")


def run(args: argparse.Namespace) -> int:
    """Print every finding; 1 if serving would fail."""
    server, store = Server(args.port), args.model_store
    packages = {"torchserve": ("0.12", INSTALL), "torch-model-archiver": ("0.12", INSTALL)}
    packages |= {name: (oldest, f"pip install '{name}>={oldest}'") for name, oldest in _NEEDED.items()}
    checks: list[Callable[[], Finding]] = [
        partial(Finding, "Python", f"{platform.python_version()} ({sys.executable})"),
        _java,
        *(partial(_package, name, *needed) for name, needed in packages.items()),
        _runtimes,
        _gpu,
        *([partial(_auto, args.bundle)] if args.bundle else []),
        partial(_store, store),
        partial(_folder, server),
        partial(_disk, server, store),
        *(partial(check, server) for check in (_ports, _keys, _answers)),
    ]
    failed = False
    for finding in (check() for check in checks):
        mark = "ok  " if not finding.cure else "warn" if finding.is_warning else "FAIL"
        failed |= mark == "FAIL"
        print(f"{mark}  {finding.name:20}  {finding.found}")
        if finding.cure:
            print(f"{'':26}  -> {finding.cure}")
    return 1 if failed else 0


def _java() -> Finding:
    try:
        java = find_java()
    except CliError as error:
        return Finding("Java", "none that TorchServe can use", str(error))
    return Finding("Java", f"{java.version} from {java.source} ({java.home})")


def _package(name: str, oldest: str, cure: str) -> Finding:
    if (version := packages.version(name)) is None:
        return Finding(name, "not installed", cure)
    return Finding(name, version, "" if _numbers(version) >= _numbers(oldest) else cure)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2] if part.isdigit()]


def _runtimes() -> Finding:
    found = runtimes.available()
    if not found:
        return Finding("runtimes", "none", "pip install onnxruntime or pip install openvino")
    return Finding("runtimes", f"{', '.join(found)}; auto takes {runtimes.choose('auto')}")


def _auto(bundle: Path) -> Finding:
    from handlers import fastest
    from handlers.manifest import Manifest
    from handlers.runtimes import choice

    try:
        manifest = Manifest.read(bundle)
        if manifest.runtime != "auto":
            return Finding("runtime", f"{manifest.runtime}: {manifest.name} names it")
        found = choice.kept(manifest) or fastest.measure(bundle)
    except MlvgmError as error:
        return Finding("runtime", f"{bundle} cannot be run", str(error))
    if choice.kept(manifest) or not found.milliseconds:
        return Finding("runtime", str(found))
    cure = f"try again on a quiet machine, with ${cache.VARIABLE} naming a folder of your own"
    return Finding("runtime", f"{found}; not kept: workers take {runtimes.choose('auto')}", cure, is_warning=True)


def _gpu() -> Finding:
    """None is needed; but one that nothing can use is most likely not meant."""
    try:
        version = re.search(r"Kernel Module.*?(\d+\.\d+\S*)", _NVIDIA_DRIVER.read_text())
    except OSError:
        return Finding("GPU", "no NVIDIA driver: the CPU computes")
    driver = f"NVIDIA driver {version[1] if version else 'of unknown version'}"
    if not set(runtimes.installed()) - set(runtimes.ON_CPU):
        cure = "pip install torch tensorrt, or onnxruntime-gpu instead of onnxruntime"
        return Finding("GPU", f"{driver}, but no runtime for it", cure, is_warning=True)
    usable = [name for name in runtimes.available() if name not in runtimes.ON_CPU]
    if not usable:
        cure = "let this machine have the GPU's devices: a container needs --gpus all"
        return Finding("GPU", f"{driver}, but no device in /dev", cure, is_warning=True)
    return Finding("GPU", f"{driver}; for {', '.join(usable)}")


def _store(store: Path) -> Finding:
    archives = sorted(store.glob("*.mar"))
    if not archives:
        cure = f"mlvgm export, then mlvgm archive BUNDLE --out {store}"
        return Finding("model store", f"{store}: no archive", cure, is_warning=True)
    for archive in archives:
        try:
            model_archive.read(archive)
        except CliError as error:
            return Finding("model store", f"{archive.name} cannot be served", str(error))
    return Finding("model store", f"{store}: {', '.join(path.name for path in archives)}")


def _folder(server: Server) -> Finding:
    """The first folder upwards that exists must take new ones."""
    existing = _existing(server)
    writable = os.access(existing, os.W_OK | os.X_OK)
    cure = "" if writable else "set MLVGM_STATE to a folder that you may write in"
    return Finding("server folder", f"{server.folder} {'can' if writable else 'cannot'} be written", cure)


def _disk(server: Server, store: Path) -> Finding:
    """TorchServe unpacks every archive at each start."""
    needed = sum(path.stat().st_size for path in store.glob("*.mar")) + _SPARE_BYTES
    free = shutil.disk_usage(_existing(server)).free
    found = f"{free / 1e9:.1f} GB free at {_existing(server)}, {needed / 1e9:.1f} GB needed for all archives"
    cure = "" if free >= needed else "set MLVGM_STATE to a folder on a larger disk, or serve fewer archives"
    return Finding("disk", found, cure)


def _existing(server: Server) -> Path:
    return next(path for path in (server.folder, *server.folder.parents) if path.exists())


def _ports(server: Server) -> Finding:
    if server.process():
        return Finding("ports", f"a server of ours is running on {server.port}")
    taken = [str(port) for port in server.ports if port_is_taken(port)]
    if taken:
        return Finding("ports", f"{', '.join(taken)} taken", "mlvgm serve --port N with five free ports in a row")
    return Finding("ports", f"{server.ports[0]} to {server.ports[-1]} are free")


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


def _answers(server: Server) -> Finding:
    """Of a running server: TorchServe says of itself that it is healthy with a dead worker."""
    if not server.process():
        return Finding("answers", "none, as no server is running")
    cure = f"look into {server.log}; mlvgm serve --stop, then mlvgm serve"
    for model in server.models:
        try:
            server.client(_PATIENCE_S).predict(grey_png(), model, samples=1)
        except ServerError as error:
            return Finding("answers", f"{model}: {error}", cure)
    return Finding("answers", f"{', '.join(server.models)} answered")
