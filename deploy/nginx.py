"""nginx in front of TorchServe."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

from deploy.errors import CliError
from deploy.readiness import Readiness
from deploy.server import Server
from deploy.signals import undisturbed
from deploy.torchserve import kill_group

UPSTREAM = """\
# Written by deploy/pair.py.
upstream torchserve {{
    # TorchServe buffers bodies outside its queue, so what reaches it at once is bounded here.
    zone torchserve 64k;
    server 127.0.0.1:{port} max_conns=64;
    keepalive 16;
}}
upstream torchserve_metrics {{
    server 127.0.0.1:{metrics_port};
}}
map "" $torchserve_key {{
    default "{key}";
}}
"""


class Front:
    """nginx, which sends what it takes to ``server``.

    Args:
        conf: nginx's configuration; a change in its folder reloads it. It includes ``upstream.conf``, which is written
            into the folder of the servers.
        timeout: seconds after which a model that does not answer is not ready.
    """

    def __init__(self, conf: Path, server: Server, timeout: float) -> None:
        self._conf, self._server = conf.absolute(), server
        self._upstream = ""
        self._seen: list[tuple[str, int, int]] = []
        self._readiness = Readiness(server, server.folder.parent / "ready", timeout)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._changed()
        command = [*self._command(), "-g", "daemon off;"]
        with undisturbed():
            self._process = subprocess.Popen(command, start_new_session=True)
        self._readiness.start()

    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def reload_if_changed(self) -> None:
        if self._changed() and self._process:
            self._process.send_signal(signal.SIGHUP)

    def switch(self, server: Server, timeout: float) -> None:
        """Send what comes from now on to another server, and wait until all that went to the former is answered.

        Args:
            timeout: seconds to wait.

        Raises:
            CliError: nginx does not read its configuration anew; it goes on with the former server.
        """
        import psutil  # type: ignore[import-untyped]

        assert self._process
        former, self._server = self._server, server
        master = psutil.Process(self._process.pid)
        workers = master.children()
        self._changed()
        checked = subprocess.run([*self._command(), "-t", "-q"], capture_output=True, text=True)
        if checked.returncode == 0:
            self._process.send_signal(signal.SIGHUP)
            self._readiness.follow(server)
            if not psutil.wait_procs(workers, timeout)[1] or set(master.children()) - set(workers):
                return
        self._server = former
        self._readiness.follow(former)
        self.reload_if_changed()
        raise CliError(f"nginx does not take its configuration: {checked.stderr.strip()}")

    def drain(self, timeout: float) -> None:
        """Take nothing new and wait until all is answered; after ``timeout`` seconds end it all the same."""
        if self._process is None:
            return
        self._readiness.stop()
        self._process.send_signal(signal.SIGQUIT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        kill_group(self._process)  # a master that was killed leaves its workers behind, and they go on listening

    def _command(self) -> list[str]:
        program = find_nginx()
        if program is None:
            raise CliError("nginx is not installed (Debian: apt install nginx-light)")
        return [program, "-c", str(self._conf), "-e", "stderr"]

    def _changed(self) -> bool:
        """Whether anything nginx reads is new; ``upstream.conf`` is then as it should be."""
        files = [(str(path), path.stat()) for path in sorted(self._conf.parent.rglob("*")) if path.is_file()]
        seen = [(name, state.st_mtime_ns, state.st_ino) for name, state in files]
        server, key = self._server, self._server.client().key("inference")
        upstream = UPSTREAM.format(port=server.port, metrics_port=server.metrics_port, key=key)
        if upstream != self._upstream:
            path = self._server.folder.parent / "upstream.conf"
            fresh = path.with_suffix(".new")
            fresh.touch(0o600)
            fresh.write_text(upstream)
            fresh.replace(path)
        changed = (upstream, seen) != (self._upstream, self._seen)
        self._upstream, self._seen = upstream, seen
        return changed


def find_nginx() -> str | None:
    """Where nginx is: Debian has it in a folder that only root's path names."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
