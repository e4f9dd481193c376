"""One TorchServe on loopback, started and stopped, with its configuration, keys and logs in a private folder."""

import importlib.util
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.errors import CliError
from deploy.java import find_java
from deploy.signals import undisturbed
from handlers.client import Client, ServerError
from handlers.pipeline import PROGRESS
from handlers.torchserve import FAILED, THREADS_VARIABLE

if TYPE_CHECKING:
    import psutil  # type: ignore[import-untyped]

PROJECT = Path(__file__).resolve().parent.parent
IN_CHECKOUT = (PROJECT / "setup.cfg").is_file()
"""Else this is an installed wheel, and `PROJECT` is site-packages."""
DEPLOY = PROJECT / "deploy"
STATE_VARIABLE = "MLVGM_STATE"
PORTS = 5
"""Of one server: inference, management, metrics, and the two of gRPC."""
INSTALL = "pip install torchserve==0.12.0 torch-model-archiver==0.12.0"

_MAIN_CLASS = "org.pytorch.serve.ModelServer"
_SOCKET_PATH_LIMIT = 90  # the workers' sockets lie below this folder, and a socket's path has 107 bytes at most


class Server:
    """The server of one port, running or not.

    Args:
        port: of inference, the first of `PORTS`.
        state: where the servers' folders lie; None takes $MLVGM_STATE, else ``build/serve`` of the checkout, or of an
            installed wheel the folder ``mlvgm`` below $XDG_STATE_HOME.
    """

    def __init__(self, port: int = 8080, state: str | Path | None = None) -> None:
        self.port = port
        parent = Path(state or os.environ.get(STATE_VARIABLE) or _default_state())
        self.folder = parent.absolute() / str(port)

    @property
    def key_file(self) -> Path:
        return self.folder / "key_file.json"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    @property
    def ports(self) -> range:
        """All that the server listens on."""
        return range(self.port, self.port + PORTS)

    @property
    def metrics_port(self) -> int:
        return self.port + 2

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def models(self) -> list[str]:
        """Names of the models the server was started with; empty when none was, or it has been stopped."""
        try:
            return list(json.loads((self.folder / "server.json").read_text())["models"])
        except (OSError, ValueError, KeyError):
            return []

    def client(self, timeout: float = 120) -> Client:
        return Client(self.url, key_file=self.key_file, timeout=timeout)

    def start(
        self,
        archives: Sequence[Path],
        workers: int = 1,
        timeout: float = 600,
        threads: int = 0,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start TorchServe with ``archives``, all of one folder, and wait until every model has answered a prediction.

        Args:
            workers: per model.
            timeout: seconds to wait.
            threads: of each worker; 0 leaves the number to $MLVGM_THREADS or the archive.
            progress: is told in one line how far a worker is.

        Raises:
            CliError: something is missing, a port is taken, or the server or a bundle does not come up.
        """
        models = {model_name(archive): archive for archive in archives}
        self._check()
        self._prepare(models)
        try:
            self._launch(archives[0].parent, models, threads)
            deadline = time.monotonic() + timeout
            for model in models:
                self._await_answer(model, deadline, progress)
                if workers > 1:
                    self.client(timeout).set_workers(model, workers)
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = 60) -> bool:
        """Stop the server and all its workers; False when there was none.

        Requests that are being answered are cut off: TorchServe does not drain.
        """
        process = self.process()
        if process is None:
            self._clear()
            return False
        import psutil

        family = [process, *process.children(recursive=True)]
        process.terminate()
        deadline = time.monotonic() + timeout
        while any(_alive(member) for member in family) and time.monotonic() < deadline:
            time.sleep(0.05)
        for member in filter(_alive, family):
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        self._clear()
        return True

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
        is_ours = _MAIN_CLASS in command and str(self.folder / "config.properties") in command
        return process if is_ours and _alive(process) else None

    def _check(self) -> None:
        """Everything that would make TorchServe fail without saying so."""
        if importlib.util.find_spec("ts") is None:
            raise CliError(f"TorchServe is not installed: {INSTALL}")
        if self.process():
            raise CliError(f"a server is running on port {self.port} already: mlvgm serve --stop --port {self.port}")
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

    def _prepare(self, models: dict[str, Path]) -> None:
        self._clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)  # keys, and a log configuration that TorchServe would take from its working directory
        for name in ("tmp", "logs"):
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
        settings += "\n# By mlvgm serve; of two equal settings the later one holds.\n"
        settings += "".join(f"{name}={value}\n" for name, value in ports.items())
        (self.folder / "config.properties").write_text(settings)
        for name in ("log4j2.xml", "metrics.yaml"):
            shutil.copyfile(DEPLOY / name, self.folder / name)
        (self.folder / "server.json").write_text(json.dumps({"port": self.port, "models": list(models)}))

    def _launch(self, store: Path, models: dict[str, Path], threads: int) -> None:
        command = [sys.executable, "-m", "ts.model_server", "--start", "--ncs"]
        command += ["--ts-config", str(self.folder / "config.properties")]
        command += ["--log-config", str(self.folder / "log4j2.xml")]
        command += ["--model-store", str(store.resolve())]
        command += ["--models", *(f"{name}={archive.name}" for name, archive in models.items())]
        with self.log.open("wb") as log, undisturbed():
            # A session of its own: Ctrl-C must reach us alone, so that we stop the server in order.
            launcher = subprocess.run(
                command,
                cwd=self.folder,
                env=self._environment(threads),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if launcher.returncode != 0:
            raise CliError(f"TorchServe does not start: {self._last_words()}")

    def _environment(self, threads: int) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
        environment |= {
            "JAVA_HOME": str(find_java().home),
            "TEMP": str(self.folder / "tmp"),
            "TMPDIR": str(self.folder / "tmp"),
            "LOG_LOCATION": str(self.folder / "logs"),
            "METRICS_LOCATION": str(self.folder / "logs"),
        }
        if threads:
            environment[THREADS_VARIABLE] = str(threads)
        return environment

    def _await_answer(self, model: str, deadline: float, progress: Callable[[str], None]) -> None:
        """TorchServe's own health check says yes long before a worker is up: only an answer counts."""
        said, shown = "nothing", 0
        while time.monotonic() < deadline:
            steps = [line[line.index(PROGRESS) :] for line in self._said() if PROGRESS in line]
            for step in steps[shown:]:
                progress(step)
            shown = len(steps)
            if self.process() is None:
                raise CliError(f"TorchServe ended while starting: {self._last_words()}")
            if reason := self._failure():
                raise CliError(reason)
            try:
                if self.client(5).ready_workers(model):
                    self.client(max(1.0, deadline - time.monotonic())).predict(grey_png(), model, samples=1)
                    return
            except ServerError as error:
                if error.status == 404:
                    raise CliError(f"TorchServe could not load {model}: {self._last_words()}") from None
                said = str(error)
            time.sleep(0.25)
        raise CliError(f"{model} has not answered in time (last: {said}); its log is {self.log}")

    def _failure(self) -> str | None:
        """What a worker said when it could not serve its bundle."""
        for line in self._said():
            if FAILED in line:
                return line[line.index(FAILED) :]
        return None

    def _said(self) -> list[str]:
        """The lines of the log."""
        return self.log.read_text(errors="replace").splitlines()

    def _last_words(self) -> str:
        lines = [line for line in self._said() if line.strip()]
        telling = [line for line in lines if "bind" in line or "ERROR" in line or "not found" in line]
        return f"{(telling or lines or ['nothing in its log'])[-1].strip()} (log: {self.log})"

    def _clear(self) -> None:
        """Remove what only a running server has; the log stays."""
        for name in ("key_file.json", "server.json"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)


def model_name(archive: Path) -> str:
    """The name that an archive gives its model.

    Raises:
        CliError: no such file, or not an archive. TorchServe would only warn, and serve nothing.
    """
    if not archive.exists():
        raise CliError(f"{archive}: no such archive; build one with mlvgm archive BUNDLE")
    try:
        if archive.is_dir():
            manifest = (archive / "MAR-INF" / "MANIFEST.json").read_bytes()
        elif archive.name.endswith(".tar.gz"):
            with tarfile.open(archive) as tar:
                member = next(name for name in tar.getnames() if name.endswith("MAR-INF/MANIFEST.json"))
                stream = tar.extractfile(member)
                manifest = stream.read() if stream else b""
        else:
            with zipfile.ZipFile(archive) as zipped:
                manifest = zipped.read("MAR-INF/MANIFEST.json")
        content: dict[str, Any] = json.loads(manifest)
        return str(content["model"]["modelName"])
    except (OSError, KeyError, ValueError, StopIteration, tarfile.TarError, zipfile.BadZipFile):
        raise CliError(
            f"{archive}: not a model archive, or damaged: build it again with mlvgm archive BUNDLE"
        ) from None


def _default_state() -> Path:
    if IN_CHECKOUT:
        return PROJECT / "build" / "serve"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mlvgm"


def free_ports(count: int) -> int:
    """The first of so many free ports in a row, below those that the system hands out by itself."""
    while True:
        port = random.randrange(20_000, 30_000)
        if not any(port_is_taken(port + i) for i in range(count)):
            return port


def port_is_taken(port: int) -> bool:
    """Whether another program listens on ``port`` of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _alive(process: "psutil.Process") -> bool:
    import psutil

    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def grey_png() -> bytes:
    """A small image, to see whether a server answers."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (32, 32), "grey").save(stream, "PNG")
    return stream.getvalue()
