"""nginx in front of TorchServe."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.child import Child, kill_group
from deploy.errors import CliError
from deploy.health import Health
from deploy.output import Output
from deploy.readiness import Readiness
from deploy.server import DEPLOY, Server
from deploy.signals import pause
from handlers.files import replace
from handlers.reply import ServerError
from handlers.request import MAX_BODY

if TYPE_CHECKING:
    import psutil

UPSTREAM = (DEPLOY / "upstream.conf").read_text()
RELOAD_SECONDS = 30.0
"""In which nginx takes a new configuration, even on a busy machine."""


class Nginx:
    """nginx, which forwards requests to ``server``.

    Args:
        conf: nginx's configuration, which is reloaded after changes in its folder. It includes ``upstream.conf``, which
            is written to the state folder.
        readiness: of the models, for the ``/v2`` paths.
        output: takes its log.
    """

    def __init__(self, conf: Path, server: Server, readiness: Readiness, output: Output) -> None:
        self._conf, self._server, self._readiness = conf.absolute(), server, readiness
        self._output = output
        self._state = server.folder.parent
        self._health = Health(self._state / "health.sock", readiness, lambda: self._server)
        self._upstream = ""
        self._seen: list[tuple[str, int, int]] = []
        self._process: Child | None = None

    def start(self) -> None:
        """Start nginx; the caller must hold the lock of the state folder."""
        self._end_remains()
        self._changed()
        self._health.start()
        # SIGTERM, because the workers of a killed master would keep listening.
        self._process = Child([*self._command(), "-g", "daemon off;"], self._output, signal.SIGTERM)

    def ended(self) -> bool:
        """Whether it was started and has ended since, by itself or killed."""
        return self._process is not None and self._process.ended()

    def reload_if_changed(self) -> None:
        """Have nginx read its files again if one has changed, or the key of its server."""
        if self._changed() and self._process:
            self._process.send(signal.SIGHUP)

    def switch(self, server: Server, timeout: float) -> None:
        """Forward new requests to another server, and wait until the former one has answered all of its own.

        Args:
            timeout: seconds to wait for these answers.

        Raises:
            CliError: nginx does not take its configuration. It keeps forwarding to the former server.
            ServerError: ``server`` has no key.
        """
        former, self._server = self._server, server
        try:
            self._reload(server, timeout)
        except (CliError, ServerError, OSError):
            self._server = former
            with contextlib.suppress(ServerError, OSError):  # the former may be dead
                self.reload_if_changed()
            raise

    def _reload(self, server: Server, timeout: float) -> None:
        import psutil

        assert self._process
        workers = set(psutil.Process(self._process.pid).children())
        self._changed()
        if fault := self._fault():
            raise CliError(f"nginx rejects its configuration: {fault}")
        self._process.send(signal.SIGHUP)
        begun, is_followed = time.monotonic(), False
        while not is_followed or time.monotonic() - begun < timeout:
            if not is_followed and time.monotonic() - begun > max(timeout, RELOAD_SECONDS):
                raise CliError("nginx has not taken its configuration")
            workers = {worker for worker in workers if worker.is_running()}
            # Not before: what these accept goes to the former server, which may be dead.
            if not is_followed and not any(map(_listens, workers)):
                self._readiness.follow(server)
                is_followed = True
            if not workers:
                return
            pause(0.1)

    def drain(self, timeout: float) -> None:
        """Accept no new requests and wait until all are answered, at most ``timeout`` seconds; then stop nginx."""
        if self._process is None:
            return
        self._readiness.stop()
        self._process.end(signal.SIGQUIT, timeout)
        self._health.stop()

    def _fault(self) -> str:
        """nginx's error message for its configuration."""
        try:
            checked = subprocess.run([*self._command(), "-t", "-q"], capture_output=True, text=True, timeout=20)
        except subprocess.TimeoutExpired:
            return "it is still reading it after 20 s"
        return checked.stderr.strip() if checked.returncode else ""

    def _command(self) -> list[str]:
        program = find_nginx()
        if program is None:
            raise CliError("nginx is not installed (Debian: apt install nginx-light)")
        return [program, "-c", str(self._conf), "-e", "stderr"]

    def _end_remains(self) -> None:
        """Stop the processes of an nginx whose parent was killed: they would keep the port."""
        try:
            leader = int((self._state / "nginx.pid").read_text())
        except (OSError, ValueError):
            return
        import psutil

        for process in psutil.process_iter(["name"]):
            try:
                if process.info["name"] == "nginx" and os.getpgid(process.pid) == leader:
                    kill_group(leader)
            except ProcessLookupError:
                continue

    def _changed(self) -> bool:
        """Whether a file that nginx reads has changed. Also updates ``upstream.conf``."""
        seen = []
        with contextlib.suppress(FileNotFoundError):  # something is being replaced: the next look finds all
            for path in sorted(path for path in self._conf.parent.rglob("*") if path.is_file()):
                state = path.stat()
                seen.append((str(path), state.st_mtime_ns, state.st_ino))
        server = self._server
        share = fair_share(server)
        upstream = UPSTREAM % {
            "port": server.port,
            "metrics_port": server.metrics_port,
            "socket": self._state / "health.sock",
            "key": server.client().key("inference"),
            "most_requests": most_requests(server),
            "fair_share": max(1, share),
            "small_share": 2 * max(1, share),
            "sharing": "$client" if share and several_clients(self._conf.parent / "private" / "clients.map") else "",
            "most_bytes": MAX_BODY,
        }
        if upstream != self._upstream:
            replace(self._state / "upstream.conf", upstream, 0o600)
        changed = (upstream, seen) != (self._upstream, self._seen)
        self._upstream, self._seen = upstream, seen
        return changed


def _listens(process: "psutil.Process") -> bool:
    import psutil

    try:
        return any(each.status == psutil.CONN_LISTEN for each in process.net_connections("tcp"))
    except psutil.Error:  # it has just ended
        return False


def fair_share(server: Server) -> int:
    """Concurrent costly requests of a client that shares the workers with others: one fewer than any model has workers.

    0 where a model has only one.
    """
    return min((model.workers for model in server.served().values()), default=1) - 1


def several_clients(clients_map: Path) -> bool:
    """Whether the file names more than one client, by whatever number of keys."""
    try:
        lines = clients_map.read_text(errors="replace").splitlines()
    except OSError:  # it is being replaced
        return True
    return len({line.split()[-1] for line in lines if line.strip() and not line.lstrip().startswith("#")}) > 1


def most_requests(server: Server) -> int:
    """Concurrent requests allowed per client: half of those that the smallest model holds, running and queued."""
    taken = [model.queue + model.workers * model.batch_size for model in server.served().values()]
    return max(1, min(taken, default=64) // 2)


def find_nginx() -> str | None:
    """Path of nginx, which Debian installs in a folder that is only in root's PATH."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
