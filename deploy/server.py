"""A TorchServe of this project: its ports, keys, files and processes."""

import contextlib
import json
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy.child import kill_group
from deploy.model_archive import ServedModel
from handlers.client import Client
from handlers.image import encode_png

if TYPE_CHECKING:
    import psutil

PROJECT = Path(__file__).resolve().parent.parent
IN_CHECKOUT = (PROJECT / "setup.cfg").is_file()
"""Else this is an installed wheel, and `PROJECT` is site-packages."""
DEPLOY = PROJECT / "deploy"
STATE_VARIABLE = "MLVGM_STATE"
PORTS = 5
"""Number of ports of a server: inference, management, metrics, and two for gRPC."""
MAIN_CLASS = "org.pytorch.serve.ModelServer"


class Server:
    """The TorchServe at a port, whether or not it runs, and whatever process has started it.

    Args:
        port: the inference port, the first of `PORTS`.
        state: folder of the servers' folders; by default $MLVGM_STATE, or else ``build/serve`` of the checkout or, for
            an installed wheel, the folder ``mlvgm`` in $XDG_STATE_HOME.
    """

    def __init__(self, port: int = 8080, state: str | Path | None = None) -> None:
        self.port = port
        parent = Path(state or os.environ.get(STATE_VARIABLE) or _default_state())
        self.folder = parent.absolute() / str(port)
        self.key_file = self.folder / "key_file.json"
        self.log = self.folder / "server.log"
        self.ports = range(port, port + PORTS)
        self.metrics_port = port + 2
        self.url = f"http://127.0.0.1:{port}"

    @property
    def models(self) -> list[str]:
        """Names of the models of the running server; empty if it does not run."""
        return list(self.served())

    def served(self) -> dict[str, ServedModel]:
        """The models of the running server."""
        try:
            models = json.loads((self.folder / "server.json").read_text())["models"]
            return {name: ServedModel(**model) for name, model in models.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def client(self, timeout: float = 120) -> Client:
        """A client with the keys of this server that waits ``timeout`` seconds for an answer."""
        return Client(self.url, key_file=self.key_file, timeout=timeout)

    def process(self) -> "psutil.Process | None":
        """The running server's process, or None."""
        try:
            import psutil

            process = psutil.Process(int((self.folder / "tmp" / ".model_server.pid").read_text()))
            command = process.cmdline()
        except (OSError, ValueError, ImportError):
            return None
        except psutil.Error:
            return None
        is_ours = MAIN_CLASS in command and str(self.folder / "config.properties") in command
        return process if is_ours and _is_alive(process) else None

    def worker_seconds(self) -> float | None:
        """Seconds of CPU time used by the workers, which grow while they compute.

        None if the processes are not visible, as those in another container, or one has just ended.
        """
        process = self.process()
        if process is None:
            return None
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended, or one of its workers
            times = [worker.cpu_times() for worker in process.children()]
            return float(sum(each.user + each.system for each in times))
        return None

    def stop(self, timeout: float = 60) -> bool:
        """Stop the server and its workers, whatever process has started it; False if it does not run.

        Running requests are aborted: TorchServe does not finish them.
        """
        process = self.process()
        if process is None:
            return False
        process.send_signal(signal.SIGTERM)
        _await_end(process, timeout)
        kill_group(process.pid)
        _await_end(process, 10)
        self.clear()
        return True

    def clear(self) -> None:
        """Remove the files of a running server; the log stays."""
        import shutil

        for name in ("key_file.json", "server.json"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)


def _default_state() -> Path:
    if IN_CHECKOUT:
        return PROJECT / "build" / "serve"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mlvgm"


def free_ports(count: int) -> int:
    """The first of ``count`` consecutive free ports, below the system's range of ephemeral ports."""
    while True:
        port = random.randrange(20_000, 30_000)
        if not any(port_is_taken(port + i) for i in range(count)):
            return port


def port_is_taken(port: int) -> bool:
    """Whether a program listens on ``port`` of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _await_end(process: "psutil.Process", seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_alive(process: "psutil.Process") -> bool:
    import psutil

    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def grey_png() -> bytes:
    """A small image for probes."""
    return encode_png(np.full((3, 32, 32), 0.5, np.float32))
