"""A bundle on a TorchServe of its own: archived, started on free ports, watched, and gone without a trace."""

import ssl
import tempfile
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.server.call import Call, prediction
from benchmarks.server.started import Started
from deploy.server import PORTS, free_ports
from deploy.torchserve import TorchServe
from export import archive
from handlers.manifest import Manifest


class Deployment(Started):
    """The `Target` that is measured.

    >>> with Deployment("build/road-signs", archive.Settings(allow_seed=True)) as deployment:
    ...     deployment.memory()
    """

    def __init__(self, bundle: str | Path, settings: archive.Settings, workers: int = 1, threads: int = 0) -> None:
        self._bundle, self._settings, self._workers, self._threads = bundle, settings, workers, threads
        self._folder = tempfile.TemporaryDirectory(prefix="mlvgm-")
        self.model = Manifest.read(bundle).name
        self.server = TorchServe(free_ports(PORTS), self._folder.name)
        self.address = ("127.0.0.1", self.server.port)
        self.tls: ssl.SSLContext | None = None
        self._key = b""

    def start(self) -> None:
        built = archive.build_archive(self._bundle, Path(self._folder.name) / "store", self._settings)
        self.server.start([built], self._workers, threads=self._threads)
        self._key = self._read_key()

    def stop(self) -> None:
        self.server.stop()
        self._folder.cleanup()

    def request(self, call: Call) -> bytes:
        return prediction(call, self.model, self._key)

    def refresh_key(self, request: bytes, body: bytes) -> bool:
        if b"InvalidKeyException" not in body:
            return False
        if self._key in request:
            if self._read_key() == self._key:
                self.server.client().renew_key("inference")
            self._key = self._read_key()
        return True

    def workers(self) -> "list[Any]":
        """The processes that answer, as psutil knows them."""
        process = self.server.process()
        return process.children(recursive=True) if process else []

    def memory(self) -> int:
        """Resident bytes of all workers together."""
        total = 0
        for worker in self.workers():
            try:
                total += worker.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def _read_key(self) -> bytes:
        return f"Authorization: Bearer {self.server.client().key('inference')}\r\n".encode()
