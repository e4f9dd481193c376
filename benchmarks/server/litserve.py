"""LitServe on loopback in processes of its own, started and stopped."""

import contextlib
import http.client
import importlib.util
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from benchmarks.server.call import Call, head
from benchmarks.server.started import Started
from benchmarks.server.subject import Settings
from deploy.errors import CliError
from deploy.server import PROJECT, free_ports


def is_installed() -> bool:
    """Whether there is anything to compare with."""
    return importlib.util.find_spec("litserve") is not None


class LitServe(Started):
    """The `Target` that TorchServe is compared with."""

    def __init__(self, settings: Settings, workers: int, threads: int, delay_ms: float, timeout: float = 600) -> None:
        self.address = ("127.0.0.1", free_ports(1))
        self.tls: ssl.SSLContext | None = None
        self._command = [sys.executable, "-m", "benchmarks.server.litserve_app", "--bundle", str(settings.bundle)]
        self._command += ["--port", str(self.address[1]), "--batch", str(settings.batch), "--runtime", settings.runtime]
        self._command += ["--workers", str(workers), "--threads", str(threads), "--delay", str(delay_ms / 1000)]
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="mlvgm-litserve-")
        self._log = Path(self._folder.name) / "log"
        self._process: psutil.Popen | None = None

    def start(self) -> None:
        with self._log.open("wb") as log:
            self._process = psutil.Popen(
                self._command,
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._await()
        self._signal(psutil.Process.suspend)

    def stop(self) -> None:
        family = self._family()
        self._signal(psutil.Process.resume)
        for process in family[:1]:
            process.terminate()
        for process in psutil.wait_procs(family, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        self._folder.cleanup()

    def request(self, call: Call) -> bytes:
        return head("POST /predict HTTP/1.1", "127.0.0.1", b"", call.headers, len(call.body)) + call.body

    def renewed(self, request: bytes, body: bytes) -> bool:
        return False

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run for as long as this lasts: its processes ask for work all the time, which others would feel."""
        self._signal(psutil.Process.resume)
        try:
            yield
        finally:
            self._signal(psutil.Process.suspend)

    def _family(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, send: Callable[[psutil.Process], None]) -> None:
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                send(process)

    def _await(self) -> None:
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline and self._process and self._process.poll() is None:
            connection = http.client.HTTPConnection(*self.address, timeout=5)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            time.sleep(0.25)
        lines = self._log.read_text(errors="replace").strip().splitlines()
        raise CliError(
            f"LitServe does not start (leave it out with --no-litserve): {(lines or ['it said nothing'])[-1]}"
        )
