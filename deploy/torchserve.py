"""Run TorchServe as a child process, with its configuration, keys and logs in a private folder."""

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import TypeVar

from deploy import model_archive, unpacked
from deploy.child import Child
from deploy.errors import CliError
from deploy.java import find_java
from deploy.output import Output
from deploy.readiness import ask
from deploy.server import DEPLOY, MAIN_CLASS, STATE_VARIABLE, Server, port_is_taken
from deploy.signals import pause
from handlers.pipeline import PROGRESS
from handlers.reply import ServerError
from handlers.torchserve import FAILED, THREADS_VARIABLE

INSTALL = "pip install torchserve==0.12.0 torch-model-archiver==0.12.0"

_RENEW_BEFORE = timedelta(hours=1)
_STOP_SECONDS = 20.0
_SOCKET_PATH_LIMIT = 90  # the workers' sockets are in this folder, and the path of a socket is limited to 107 bytes
_GRPC_CLASS = "org/pytorch/serve/grpc/inference/InferenceAPIsServiceGrpc.class"
_STREAMING = (b"StreamPredictions", b"StreamPredictions2")

T = TypeVar("T")


class TorchServe(Server):
    """A TorchServe that this object starts. Java is started directly, since TorchServe's launcher would not stop it.

    Args:
        output: takes its log; None for the file ``server.log``.
        detached: whether it keeps running when this process ends.
    """

    def __init__(
        self,
        port: int = 8080,
        state: str | Path | None = None,
        output: Output | None = None,
        detached: bool = False,
    ) -> None:
        super().__init__(port, state)
        self._output, self._detached = output, detached
        self._java: Child | None = None
        self._lock: int | None = None

    def start(
        self,
        archives: Sequence[Path],
        workers: int = 1,
        timeout: float = 600,
        threads: int = 0,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start TorchServe with ``archives``, all in one folder, and wait until every model has answered a probe.

        Args:
            workers: per model.
            timeout: seconds to wait.
            threads: per worker; 0 for $MLVGM_THREADS or the archive's setting.
            progress: called with one line about the progress of a worker.

        Raises:
            CliError: something is missing, a port is taken, or the server or a bundle does not start.
            Stopped: a signal has arrived (`deploy.signals`).
        """
        models = {model.name: (model, archive) for archive in archives for model in [model_archive.read(archive)]}
        self._check()
        self._take_lock()
        try:
            self._prepare({name: asdict(replace(model, workers=workers)) for name, (model, _) in models.items()})
            store = self.folder / "archives"
            unpacked.prepare(store, archives)
            needs_torch = not all(model.on_cpu for model, _ in models.values())
            named = [f"{name}={archive.name}" for name, (_, archive) in models.items()]
            self._launch(store, named, threads, needs_torch)
            deadline = time.monotonic() + timeout
            for model in models:
                self._await_answer(model, workers, deadline, progress)
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = _STOP_SECONDS) -> bool:
        """Stop the server if this object has started it; otherwise returns False."""
        if self._lock is None:
            return False
        if self._java:
            self._java.end(signal.SIGTERM, timeout)
        self.clear()
        os.close(self._lock)
        self._java = self._lock = None
        return True

    def ended(self) -> bool:
        """Whether it was started and has ended since, by itself or killed."""
        return self._java is not None and self._java.ended()

    def renew_if_due(self) -> None:
        """Renew the key long before it expires, which can happen after a jump of the clock."""
        text = json.loads(self.key_file.read_text())["inference"]["expiration time"]
        expires = datetime.fromisoformat(text[:19]).replace(tzinfo=timezone.utc)
        if expires - datetime.now(timezone.utc) < _RENEW_BEFORE:
            self.client(5).renew_key("inference")

    def _check(self) -> None:
        """Check all that would make TorchServe fail without an error message."""
        if importlib.util.find_spec("ts") is None:
            raise CliError(f"TorchServe is not installed: {INSTALL}")
        if self.process():
            raise CliError(self._already())
        for port in self.ports:
            if port_is_taken(port):
                raise CliError(
                    f"port {port} is taken by another program: choose five free ports in a row with --port "
                    f"(this server needs {self.ports[0]} to {self.ports[-1]})"
                )
        if len(os.fsencode(self.folder)) > _SOCKET_PATH_LIMIT:
            raise CliError(
                f"{self.folder}: too long a path for the workers' sockets: set {STATE_VARIABLE} to a short one"
            )

    def _take_lock(self) -> None:
        """Lock the folder, until this process and Java, which inherits the lock, have ended in whatever way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)  # keys, and a log configuration that TorchServe would take from its working directory
        self._lock = try_lock(self.folder / "lock")
        if self._lock is None:
            raise CliError(self._already())
        self._end_remains()

    def _already(self) -> str:
        return f"a server is running on port {self.port} already: mlvgm serve --stop --port {self.port}"

    def _end_remains(self) -> None:
        """Kill Java and workers of this folder whose parent was killed; with the lock held, there can be no others."""
        import psutil

        mark = str(self.folder / "tmp")
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            is_ours = MAIN_CLASS in words or any("model_service_worker" in word for word in words)
            if is_ours and any(mark in word for word in words):
                process.kill()
                psutil.wait_procs([process], 5)

    def _prepare(self, models: dict[str, object]) -> None:
        self.clear()
        for name in ("tmp", "logs", "org"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        ports = {
            "inference_address": f"http://127.0.0.1:{self.port}",
            "management_address": f"http://127.0.0.1:{self.port + 1}",
            "metrics_address": f"http://127.0.0.1:{self.metrics_port}",
            "grpc_inference_port": str(self.port + 3),
            "grpc_management_port": str(self.port + 4),
            "metrics_config": str(self.folder / "metrics.yaml"),
        }
        settings = (DEPLOY / "config.properties").read_text()
        settings += "\n# Of this server; of two equal settings the later one holds.\n"
        settings += "".join(f"{name}={value}\n" for name, value in ports.items())
        (self.folder / "config.properties").write_text(settings)
        for name in ("log4j2.xml", "metrics.yaml"):
            shutil.copyfile(DEPLOY / name, self.folder / name)
        (self.folder / "server.json").write_text(json.dumps({"port": self.port, "models": models}))

    def _launch(self, store: Path, models: list[str], threads: int, needs_torch: bool) -> None:
        temporary = self.folder / "tmp"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
        environment |= dict.fromkeys(("TEMP", "TMPDIR"), str(temporary))
        environment |= dict.fromkeys(("LOG_LOCATION", "METRICS_LOCATION"), str(self.folder / "logs"))
        if threads:
            environment[THREADS_VARIABLE] = str(threads)
        if not needs_torch:  # TorchServe's worker imports it all the same, which takes as long as everything else
            paths = [str(DEPLOY / "stand-in"), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = self._command(store, models)
        dies_by = 0 if self._detached else signal.SIGKILL
        assert self._lock is not None
        with contextlib.ExitStack() as stack:
            output = self._output or stack.enter_context(self.log.open("wb"))
            self._java = Child(command, output, dies_by, self.folder, environment, [self._lock])
        (temporary / ".model_server.pid").write_text(str(self._java.pid))

    def _command(self, store: Path, models: list[str]) -> list[str]:
        from ts import model_server

        site = Path(model_server.__file__).parents[1]
        _refuse_streams(site, self.folder)
        config = self.folder / "config.properties"
        command = [str(find_java().home / "bin" / "java"), f"-Dmodel_server_home={site}"]
        command += [f"-Djava.io.tmpdir={self.folder}/tmp", f"-Dlog4j.configurationFile=file://{self.folder}/log4j2.xml"]
        command += model_server.load_properties(str(config)).get("vmargs", "").split()
        command += ["-cp", f"{self.folder}:{site}/ts/frontend/*"]
        command += [MAIN_CLASS, "--python", sys.executable, "-f", str(config), "-ncs"]
        return [*command, "-s", str(store.resolve()), "-m", *models]

    def _await_answer(self, model: str, workers: int, deadline: float, progress: Callable[[str], None]) -> None:
        """Wait for all ``workers`` and an answer: TorchServe's health check succeeds long before a worker is ready."""
        last_error, shown, asked = "nothing", 0, 1
        while time.monotonic() < deadline:
            shown = self._report(progress, shown)
            if self.ended():
                raise CliError(f"TorchServe ended while starting: {self._last_words()}")
            for line in self._log_lines():
                if FAILED in line:  # the error of a worker that cannot serve its bundle
                    raise CliError(line[line.index(FAILED) :])
            try:
                if asked < workers:  # they start beside the archive's one
                    _patiently(partial(self.client(5).set_workers, model, workers, wait=False))
                    asked = workers
                if _patiently(lambda: self.client(5).ready_workers(model)) >= workers:
                    _patiently(lambda: ask(self, model, max(1.0, deadline - time.monotonic())))
                    self._report(progress, shown)
                    return
            except ServerError as error:
                if error.status == 404:
                    raise CliError(f"TorchServe could not load {model}: {self._last_words()}") from None
                last_error = str(error)
            pause(0.25)
        raise CliError(f"{model} has not answered in time (last: {last_error}){self._see_log()}")

    def _report(self, progress: Callable[[str], None], shown: int) -> int:
        """Report the steps in the log after the first ``shown``; returns the number of all of them."""
        steps = [line[line.index(PROGRESS) :] for line in self._log_lines() if PROGRESS in line]
        for step in steps[shown:]:
            progress(step)
        return len(steps)

    def _log_lines(self) -> list[str]:
        """The lines of the log."""
        if self._output:
            return list(self._java.lines) if self._java else []
        return self.log.read_text(errors="replace").splitlines()

    def _last_words(self) -> str:
        lines = [line for line in self._log_lines() if line.strip()]
        telling = [line for line in lines if "bind" in line or "ERROR" in line or "not found" in line]
        return f"{(telling or lines or ['nothing in its log'])[-1].strip()}{self._see_log()}"

    def _see_log(self) -> str:
        return "" if self._output else f" (log: {self.log})"


def try_lock(path: Path) -> int | None:
    """A descriptor that locks the file until all its duplicates are closed; None if another process has the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _patiently(call: Callable[[], T]) -> T:
    """The result of ``call``, run in a thread, so that signals can stop the wait."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not future.done():
        pause(0.02)
    return future.result()


def _refuse_streams(site: Path, folder: Path) -> None:
    """Make TorchServe answer UNIMPLEMENTED to its two streaming gRPC calls.

    With a handler that does not stream, the first kills the worker, and the second kills the thread that feeds the
    worker, which is never restarted. TorchServe has no setting for them, so the class that registers the calls is
    copied with blank names, and put before TorchServe's own on the class path.
    """
    with zipfile.ZipFile(site / "ts" / "frontend" / "model-server.jar") as jar:
        content = jar.read(_GRPC_CLASS)
    for name in _STREAMING:
        constant = b"\x01" + len(name).to_bytes(2, "big")  # a string constant of the class, with its length
        assert content.count(constant + name) == 1, f"another TorchServe than the one that is pinned: no {name!r}"
        content = content.replace(constant + name, constant + b" " * len(name))
    path = folder / _GRPC_CLASS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
