"""The servers that are measured, each started for a ``with`` block on free ports of loopback, and gone after it."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server.calls import Endpoint
from benchmarks.server.workload import Workload
from deploy.errors import CliError
from deploy.server import PORTS, free_ports
from deploy.torchserve import TorchServe
from export import archive

_START_SECONDS = 600.0


@dataclass(frozen=True)
class Deployment:
    """A bundle on a TorchServe of its own, and how to send it requests."""

    server: TorchServe
    endpoint: Endpoint

    def workers(self) -> "list[Any]":
        """The processes that answer, as psutil knows them."""
        process = self.server.process()
        return process.children(recursive=True) if process else []


@contextmanager
def torchserve(workload: Workload) -> Iterator[Deployment]:
    """A TorchServe with an archive of the bundle."""
    settings = workload.settings
    with tempfile.TemporaryDirectory(prefix="mlvgm-") as folder:
        built = archive.build_archive(settings.bundle, Path(folder) / "store", settings.archive)
        server = TorchServe(free_ports(PORTS), folder)
        try:
            server.start([built], settings.workers, threads=settings.threads)
            key = f"Authorization: Bearer {server.client().key('inference')}\r\n".encode()
            yield Deployment(server, Endpoint(server.port, workload.manifest.name, lambda: key))
        finally:
            server.stop()


@contextmanager
def dev_server(workload: Workload) -> Iterator[Endpoint]:
    """The server of ``mlvgm serve --dev``: one process, with as many threads as the workers of TorchServe together."""
    settings, port = workload.settings, free_ports(1)
    threads, delay_s = settings.threads * settings.workers, settings.archive.batch_delay_ms / 1000
    with tempfile.TemporaryDirectory(prefix="mlvgm-") as folder:
        log = Path(folder) / "log"
        served = (settings.bundle, port, settings.archive.runtime, threads, settings.archive.batch_size, delay_s, True)
        process = get_context("spawn").Process(target=_serve, args=(log, *served), daemon=True)
        process.start()
        try:
            await_start("the development server", lambda: _answers(port), lambda: not process.is_alive(), log=log)
            yield Endpoint(port, workload.manifest.name)
        finally:
            process.terminate()
            process.join(30)
            process.kill()
            process.join()


def _serve(log: Path, *arguments: Any) -> None:
    """What is run in the process of the development server."""
    from deploy import dev_server

    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    dev_server.serve(*arguments)


def await_start(
    name: str,
    ready: Callable[[], bool],
    ended: Callable[[], bool],
    seconds: float = _START_SECONDS,
    log: Path | None = None,
) -> None:
    """Wait until a server is ready.

    Raises:
        CliError: it has ended, or takes longer than ``seconds``; with the last line of its ``log``.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if ended() or time.monotonic() > deadline:
            said = log.read_text(errors="replace").strip().splitlines()[-1:] if log else []
            raise CliError(": ".join([f"{name} does not start", *said]))
        time.sleep(0.1)


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ping", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False
