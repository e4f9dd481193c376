"""The development server (deploy/dev_server.py) in a process of its own, to compare TorchServe with."""

import http.client
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.server.call import Call, prediction
from benchmarks.server.started import Started
from benchmarks.server.workload import WorkloadSettings
from deploy.errors import CliError
from deploy.server import free_ports
from handlers.manifest import Manifest


class DevServer(Started):
    """The `Target` that TorchServe is compared with: one process, whatever TorchServe has.

    Args:
        threads: CPU threads; 0 for every core.
        timeout: seconds to wait until it answers.
    """

    def __init__(self, settings: WorkloadSettings, threads: int, delay_ms: float, timeout: float = 600) -> None:
        self.address = ("127.0.0.1", free_ports(1))
        self.tls: ssl.SSLContext | None = None
        self._model = Manifest.read(settings.bundle).name
        arguments = f"pathlib.Path({str(settings.bundle)!r}), {self.address[1]}, {settings.runtime!r}, {threads}"
        arguments += f", {settings.batch}, {delay_ms / 1000}, allow_seed=True"
        program = f"import pathlib; from deploy.dev_server import serve; serve({arguments})"
        self._command = [sys.executable, "-c", program]
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="mlvgm-dev-server-")
        self._log = Path(self._folder.name) / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + self._timeout
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
                raise CliError(f"the development server does not start (leave it out with --no-dev): {said[-1]}")
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()

    def request(self, call: Call) -> bytes:
        return prediction(call, self._model, b"")

    def refresh_key(self, request: bytes, body: bytes) -> bool:
        return False

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(*self.address, timeout=5)
        try:
            connection.request("GET", "/ping")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
