"""TorchServe with nginx in front of it as one program: started in order, drained in order, never half of it left.

SIGTERM and Ctrl-C stop it: nginx takes nothing new and answers what it has, then TorchServe is stopped. If either of
the two ends by itself, so does the other, and the exit code is 1: start it again. When this program ends in whatever
way, the kernel ends both. nginx is reloaded whenever its folder changes (certificate, clients' keys), and whenever
TorchServe's key does. A TorchServe that hangs is started again: one that neither answers nor computes.

SIGUSR2 upgrades it: the archives are read anew by a second TorchServe on the five ports after those of the first (and
the next time the other way round). When it has answered, nginx sends what comes to it, and when the first has answered
what it still had, it is stopped. If the new one does not come up, the old one goes on.
"""

import argparse
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from deploy import signals
from deploy.errors import CliError
from deploy.nginx import Nginx
from deploy.output import Output
from deploy.readiness import Readiness
from deploy.server import PORTS
from deploy.signals import Stopped, pause
from deploy.torchserve import TorchServe, try_lock
from deploy.workers import chosen, sizes_of
from handlers.client import ServerError

LOOK_EVERY_S = 0.5
STOP_SECONDS = 90.0
"""To stop whatever runs, besides the time to answer what is left: after that the kernel ends everything."""


class Supervisor:
    """Both, or one of them beside the other, as the ``options`` of `parser` say."""

    def __init__(self, options: argparse.Namespace, output: Output, errors: Output) -> None:
        self._options, self._output, self._errors = options, output, errors
        self._torchserve = TorchServe(options.port, output=output)
        self._running: list[TorchServe] = []  # and the one that replaces it, or is being replaced by it
        self._readiness = Readiness(self._torchserve, options.ready_timeout)
        self._nginx: Nginx | None = None
        self._lock: int | None = None

    def start(self) -> None:
        options = self._options
        if options.only != "torchserve":
            self._take_lock()
        if options.only != "nginx":
            self._start(self._torchserve)
            self._readiness.follow(self._torchserve)
            self._say("TorchServe answers")
        self._readiness.start()
        if options.only != "torchserve":
            self._await_models()
            nginx = Nginx(options.nginx_conf, self._torchserve, self._readiness, self._output)
            nginx.start()
            self._nginx = nginx
            self._say("nginx is started")

    def stay(self) -> int:
        """Look after both until one of them ends (1).

        Raises:
            Stopped: a signal has come.
        """
        complaint = ""
        while True:
            if self._torchserve.ended() or (self._nginx and self._nginx.ended()):
                self._say(f"{'TorchServe' if self._torchserve.ended() else 'nginx'} has ended by itself")
                return 1
            try:
                self._look_after()
                complaint = ""
            except (ServerError, OSError, ValueError, KeyError) as error:
                # TorchServe is starting anew beside us, or a file is being replaced.
                if complaint != (complaint := str(error)):
                    self._say(complaint)
            if signals.upgrade_requested:
                signals.upgrade_requested = False
                self._upgrade()
            pause(LOOK_EVERY_S)

    def stop(self) -> None:
        """Drain nginx, then stop TorchServe; whatever of them was started by us."""
        with contextlib.ExitStack() as stack:  # each, whatever becomes of those before it
            stack.callback(self._say, "stopped")
            for torchserve in self._running:
                stack.callback(torchserve.stop)
            stack.callback(self._readiness.stop)
            if self._nginx:
                stack.callback(self._nginx.drain, self._options.drain)

    def _take_lock(self) -> None:
        state = self._torchserve.folder.parent
        state.mkdir(parents=True, exist_ok=True)
        self._lock = try_lock(state / "nginx.lock")
        if self._lock is None:
            raise CliError(f"{state} is in use already, by another nginx: give each $MLVGM_STATE of its own")

    def _start(self, torchserve: TorchServe) -> None:
        options = self._options
        names = options.models or sorted(path.name for path in options.model_store.glob("*.mar"))
        if not names:
            raise CliError(f"{options.model_store}: no archive there")
        archives = [options.model_store / name for name in names]
        workers, threads = chosen(options.workers, 0, sizes_of(archives))
        self._running.append(torchserve)
        try:
            torchserve.start(archives, workers, options.timeout, threads)
        except BaseException:
            self._running.remove(torchserve)
            raise

    def _await_models(self) -> None:
        """Only a port that answers predictions is opened."""
        deadline = time.monotonic() + self._options.timeout
        while not self._readiness.ready():
            if time.monotonic() > deadline:
                raise CliError(f"no model of {self._torchserve.url} answers")
            pause(LOOK_EVERY_S)

    def _look_after(self) -> None:
        if self._options.only != "nginx":
            self._torchserve.renew_if_due()
            if (seconds := self._readiness.hung_for()) > self._options.hang_timeout:
                self._restart(seconds)
        if self._nginx:
            self._nginx.reload_if_changed()

    def _restart(self, seconds: float) -> None:
        self._say(f"TorchServe has neither answered nor computed for {seconds:.0f} s: it is started again")
        old = self._torchserve
        self._running.remove(old)
        old.stop(5)
        # On other ports, where nginx does not ask it before it knows its key.
        self._torchserve = self._next() if self._nginx else TorchServe(old.port, output=self._output)
        self._start(self._torchserve)
        if self._nginx:
            self._nginx.switch(self._torchserve, self._options.drain)
        self._readiness.follow(self._torchserve)
        self._say("TorchServe answers again")

    def _upgrade(self) -> None:
        if self._options.only:
            self._say("only both together can be upgraded: start this container anew")
            return
        assert self._nginx
        self._say("upgrading: TorchServe is started with the archives as they are now")
        old, new = self._torchserve, self._next()
        try:
            self._start(new)
            self._nginx.switch(new, self._options.drain)
        except (CliError, ServerError) as error:
            outcome = f"not upgraded, the old one goes on: {error}"
            old, new = new, old
        else:
            outcome = "upgraded"
        self._torchserve = new
        old.stop()
        if old in self._running:
            self._running.remove(old)
        self._say(outcome)

    def _next(self) -> TorchServe:
        """Another one, on the five ports that the present one does not have."""
        first = self._options.port
        return TorchServe(first + PORTS if self._torchserve.port == first else first, output=self._output)

    def _say(self, text: str) -> None:
        self._errors.write(f"pair: {text}\n".encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Supervise until a signal stops it (0), or one of the two ends by itself or cannot be started (1)."""
    options = parser().parse_args(arguments)
    errors = Output(2)
    output = Output(1, lambda text: errors.write(f"pair: {text}\n".encode()))
    supervisor = Supervisor(options, output, errors)
    code = 0
    try:
        supervisor.start()
        code = supervisor.stay()
    except Stopped:
        pass
    except (CliError, ServerError) as error:
        errors.write(f"pair: {error}\n".encode())
        code = 1
    except Exception as error:
        errors.write(f"pair: a fault of this program: {error!r}\n".encode())
        code = 1
    finally:
        signals.end_by(options.drain + STOP_SECONDS)
        supervisor.stop()
        for each in (output, errors):
            each.flush(1)
    return code


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
    parser.add_argument(
        "--hang-timeout",
        type=float,
        default=60,
        metavar="S",
        help="start TorchServe again when it neither answers nor computes for so long (%(default)s)",
    )
    parser.add_argument("--drain", type=float, default=70, metavar="S", help="to answer what is left (%(default)s)")
    return parser
