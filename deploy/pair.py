"""TorchServe with nginx in front of it as one program: started in order, drained in order, never half of it left.

    python -m deploy.pair --models road-signs.mar                  both
    python -m deploy.pair --only torchserve --models road-signs.mar      for a container of its own, and
    python -m deploy.pair --only nginx                             for the one beside it, with $MLVGM_STATE in common

SIGTERM and Ctrl-C stop it: nginx takes nothing new and answers what it has, then TorchServe is stopped. If either of
the two ends by itself, so does the other, and the exit code is 1: start it again. nginx is reloaded whenever its
folder changes (certificate, clients' keys), and whenever TorchServe's key does.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cli.errors import CliError
from cli.java import find_java
from cli.server import Server
from cli.signals import stop_once, stopping, undisturbed
from cli.workers import chosen, sizes_of
from deploy.readiness import Readiness
from handlers.client import ServerError

# The key changes when TorchServe starts and when somebody renews it: every change costs the requests of that moment.
KEY_DAYS = 366
RENEW_BEFORE = timedelta(hours=1)
LOOK_EVERY_S = 0.5


class Back(Server):
    """TorchServe as a child of ours, java run directly: its log is our output, and no launcher can leave it behind."""

    java: "subprocess.Popen[bytes] | None" = None

    @property
    def log(self) -> Path:
        return Path("/dev/stdout")

    def stop(self, timeout: float = 60) -> bool:
        """As `Server.stop`, and the workers of a java that was killed."""
        stopped = super().stop(timeout)
        if self.java:
            _kill_group(self.java)
        return stopped

    def ended(self) -> bool:
        return self.java is not None and self.java.poll() is not None

    def renew_if_due(self) -> None:
        """Long before the key expires, or after a jump of the clock."""
        text = json.loads(self.key_file.read_text())["inference"]["expiration time"]
        expires = datetime.fromisoformat(text[:19]).replace(tzinfo=timezone.utc)
        if expires - datetime.now(timezone.utc) < RENEW_BEFORE:
            self.client().renew_key("inference")

    def _prepare(self, models: dict[str, Path]) -> None:
        super()._prepare(models)
        with (self.folder / "config.properties").open("a") as settings:
            settings.write(f"token_expiration_min={KEY_DAYS * 24 * 60}\n")

    def _launch(self, store: Path, models: dict[str, Path], threads: int) -> None:
        from ts import model_server  # type: ignore[import-untyped]

        site = Path(model_server.__file__).parents[1]
        config, temporary = self.folder / "config.properties", self.folder / "tmp"
        command = [str(find_java().home / "bin" / "java"), f"-Dmodel_server_home={site}"]
        command += [f"-Djava.io.tmpdir={temporary}", f"-Dlog4j.configurationFile=file://{self.folder}/log4j2.xml"]
        command += model_server.load_properties(str(config)).get("vmargs", "").split()
        command += ["-cp", f"{site}/ts/frontend/*"]
        command += ["org.pytorch.serve.ModelServer", "--python", sys.executable, "-f", str(config), "-ncs"]
        command += ["-s", str(store.resolve()), "-m", *(f"{name}={path.name}" for name, path in models.items())]
        with undisturbed():
            self.java = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._environment(threads),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            (temporary / ".model_server.pid").write_text(str(self.java.pid))
        self._lines: deque[str] = deque(maxlen=200)
        threading.Thread(target=self._pass_on, daemon=True).start()

    def _pass_on(self) -> None:
        """What java says goes on to our output; if that is full or closed, java must not wait for it."""
        assert self.java
        assert self.java.stdout
        for line in self.java.stdout:
            self._lines.append(line.decode(errors="replace").rstrip())
            with contextlib.suppress(OSError):
                os.write(1, line)

    def _said(self) -> list[str]:
        return list(self._lines)


class Front:
    """nginx, in front of the TorchServe of ``server``.

    Args:
        conf: nginx's configuration; a change in its folder reloads it.
        server: whose key nginx shows TorchServe; written to ``upstream.conf`` in the folder of the servers.
        timeout: seconds after which a model that does not answer is not ready.
    """

    def __init__(self, conf: Path, server: Server, timeout: float) -> None:
        self._conf, self._server = conf.absolute(), server
        self._key = ""
        self._seen: list[tuple[str, int, int]] = []
        self._readiness = Readiness(server, server.folder.parent / "ready", timeout)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None:
            raise CliError("nginx is not installed (Debian: apt install nginx-light)")
        self._changed()
        with undisturbed():
            command = [program, "-c", str(self._conf), "-e", "stderr", "-g", "daemon off;"]
            self._process = subprocess.Popen(command, start_new_session=True)
        self._readiness.start()

    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def reload_if_changed(self) -> None:
        if self._changed() and self._process:
            self._process.send_signal(signal.SIGHUP)

    def drain(self, timeout: float) -> None:
        """Take nothing new and wait until all is answered; after ``timeout`` seconds end it all the same."""
        if self._process is None:
            return
        self._readiness.stop()
        self._process.send_signal(signal.SIGQUIT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        _kill_group(self._process)  # a master that was killed leaves its workers behind, and they go on listening

    def _changed(self) -> bool:
        """Whether anything nginx reads is new; TorchServe's key is then where nginx reads it."""
        files = [(str(path), path.stat()) for path in sorted(self._conf.parent.rglob("*")) if path.is_file()]
        seen = [(name, state.st_mtime_ns, state.st_ino) for name, state in files]
        key = self._server.client().key("inference")
        if key != self._key:
            path = self._server.folder.parent / "upstream.conf"
            fresh = path.with_suffix(".new")
            fresh.touch(0o600)
            fresh.write_text(f'set $inference_key "{key}";\n')
            fresh.replace(path)
        changed = (key, seen) != (self._key, self._seen)
        self._key, self._seen = key, seen
        return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the pair until a signal stops it (0), or one of the two ends by itself or cannot be started (1)."""
    options = parser().parse_args(arguments)
    stop_once()
    back = Back(options.port)
    front = Front(options.nginx_conf, back, options.ready_timeout)
    try:
        if options.only != "nginx":
            names = options.models or sorted(path.name for path in options.model_store.glob("*.mar"))
            if not names:
                raise CliError(f"{options.model_store}: no archive there")
            archives = [options.model_store / name for name in names]
            workers, threads = chosen(options.workers, 0, sizes_of(archives))
            back.start(archives, workers, options.timeout, threads)
            _say("TorchServe answers")
        if options.only != "torchserve":
            _await_key(back, options.timeout)
            front.start()
            _say("nginx is started")
        return _stay(back, front, options.only)
    except KeyboardInterrupt:
        return 0
    except (CliError, ServerError) as error:
        _say(str(error))
        return 1
    finally:
        front.drain(options.drain)
        if options.only != "nginx":
            back.stop()
        _say("stopped")


def _stay(back: Back, front: Front, only: str | None) -> int:
    complaint = ""
    while not stopping.is_set():
        if back.ended() or front.ended():
            _say(f"{'TorchServe' if back.ended() else 'nginx'} has ended by itself")
            return 1
        try:
            if only != "nginx":
                back.renew_if_due()
            if only != "torchserve":
                front.reload_if_changed()
            complaint = ""
        except (ServerError, OSError, ValueError, KeyError) as error:
            # TorchServe is starting anew beside us, or a file is being replaced.
            if complaint != (complaint := str(error)):
                _say(complaint)
        time.sleep(LOOK_EVERY_S)
    return 0


def _await_key(back: Back, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            back.client().key("inference")
            return
        except ServerError:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_EVERY_S)


def _kill_group(leader: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="deploy.pair", description="TorchServe with nginx in front of it.")
    parser.add_argument("--only", choices=["torchserve", "nginx"], help="one of the two, the other runs beside it")
    parser.add_argument("--model-store", type=Path, default=Path("model_store"), help="folder of archives")
    parser.add_argument("--models", nargs="+", metavar="NAME.mar", help="archives in the store (default: all)")
    parser.add_argument("--port", type=int, default=8080, help="of TorchServe's inference on loopback (%(default)s)")
    parser.add_argument("--workers", type=int, help="per model (default: as mlvgm serve)")
    parser.add_argument("--timeout", type=float, default=1200, metavar="S", help="to wait for an answer (%(default)s)")
    parser.add_argument(
        "--nginx-conf", type=Path, default=Path("/etc/mlvgm/nginx.conf"), metavar="FILE", help="(%(default)s)"
    )
    parser.add_argument(
        "--ready-timeout",
        type=float,
        default=60,
        metavar="S",
        help="a model that takes longer is not ready (%(default)s)",
    )
    parser.add_argument("--drain", type=float, default=70, metavar="S", help="to answer what is left (%(default)s)")
    return parser


def _say(text: str) -> None:
    print(f"pair: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
