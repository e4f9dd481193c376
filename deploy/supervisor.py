"""Supervise TorchServe and nginx as one program: both are started, drained and stopped in order, and never left alone.

SIGTERM and Ctrl-C stop it: nginx accepts no new requests and answers those it has, then TorchServe is stopped. If
either of the two ends by itself, the other is stopped too, and the exit code is 1: start it again. If the supervisor
ends, in whatever way, the kernel ends both. nginx is reloaded after changes in its folder (certificate, clients' keys)
and of TorchServe's key. A TorchServe that hangs, that is neither answers nor computes, is restarted.

SIGUSR2 upgrades it: a second TorchServe loads the archives on the next five ports (and at the following upgrade on the
first five again). When its models have answered a probe, nginx forwards new requests to it, and the first TorchServe is
stopped after it has answered those it still has. If the new one does not start, the old one goes on.
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
from deploy.workers import chosen, gpus_for, sizes_of
from handlers.reply import ServerError

LOOK_EVERY_S = 0.5
STOP_SECONDS = 90.0
"""Seconds to stop everything, in addition to the time to drain; after that the kernel ends the processes."""


class Supervisor:
    """Runs both, or with ``--only`` one of them; ``options`` are those of `parser`."""

    def __init__(self, options: argparse.Namespace, output: Output, errors: Output) -> None:
        self._options, self._output, self._errors = options, output, errors
        self._torchserve = TorchServe(options.port, output=output)
        self._running: list[TorchServe] = []  # and during an upgrade the one that replaces it
        self._readiness = Readiness(self._torchserve, options.ready_timeout)
        self._nginx: Nginx | None = None
        self._lock: int | None = None

    def start(self) -> None:
        """Start both, or the one that is asked for, and return when the models answer.

        Raises:
            CliError: something is missing, or does not start.
            Stopped: a signal has arrived.
        """
        options = self._options
        if options.only != "torchserve":
            self._take_lock()
        if options.only != "nginx":
            self._start(self._torchserve)
            self._readiness.follow(self._torchserve)
            self._log("TorchServe answers")
        self._readiness.start()
        if options.only != "torchserve":
            self._await_models()
            nginx = Nginx(options.nginx_conf, self._torchserve, self._readiness, self._output)
            nginx.start()
            self._nginx = nginx
            self._log("nginx is started")

    def stay(self) -> int:
        """Supervise both until one of them ends; returns 1.

        Raises:
            Stopped: a signal has arrived.
        """
        complaint = ""
        while True:
            if self._torchserve.ended() or (self._nginx and self._nginx.ended()):
                self._log(f"{'TorchServe' if self._torchserve.ended() else 'nginx'} has ended by itself")
                return 1
            try:
                self._look_after()
                complaint = ""
            except (ServerError, OSError, ValueError, KeyError) as error:
                # TorchServe is starting anew beside us, or a file is being replaced.
                if complaint != (complaint := str(error)):
                    self._log(complaint)
            if signals.upgrade_requested:
                signals.upgrade_requested = False
                self._upgrade()
            pause(LOOK_EVERY_S)

    def stop(self) -> None:
        """Drain nginx, then stop TorchServe, as far as they were started here."""
        with contextlib.ExitStack() as stack:  # each, even if an earlier one fails
            stack.callback(self._log, "stopped")
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
        workers, threads = chosen(options.workers, 0, sizes_of(archives), gpus_for(archives))
        self._running.append(torchserve)
        try:
            torchserve.start(archives, workers, options.timeout, threads)
        except BaseException:
            self._running.remove(torchserve)
            raise

    def _await_models(self) -> None:
        """Wait until the models answer: nginx must not listen before that."""
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
        self._log(f"TorchServe has neither answered nor computed for {seconds:.0f} s: it is started again")
        old = self._torchserve
        self._running.remove(old)
        old.stop(5)
        # On other ports, where nginx does not ask it before it knows its key.
        self._torchserve = self._next() if self._nginx else TorchServe(old.port, output=self._output)
        self._start(self._torchserve)
        if self._nginx:
            self._nginx.switch(self._torchserve, self._options.drain)
        else:
            self._readiness.follow(self._torchserve)
        self._log("TorchServe answers again")

    def _upgrade(self) -> None:
        if self._options.only:
            self._log("only both together can be upgraded: start this container anew")
            return
        assert self._nginx
        self._log("upgrading: TorchServe is started with the archives as they are now")
        old, new = self._torchserve, self._next()
        try:
            self._start(new)
            self._nginx.switch(new, self._options.drain)
        except (CliError, ServerError, OSError) as error:
            outcome = f"not upgraded, the old one goes on: {error}"
            old, new = new, old
        else:
            outcome = "upgraded"
        self._torchserve = new
        old.stop()
        if old in self._running:
            self._running.remove(old)
        self._log(outcome)

    def _next(self) -> TorchServe:
        """Another TorchServe, on the five ports that the current one does not use."""
        first = self._options.port
        return TorchServe(first + PORTS if self._torchserve.port == first else first, output=self._output)

    def _log(self, text: str) -> None:
        self._errors.write(f"pair: {text}\n".encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Supervise until a signal stops it (returns 0), or one of the two ends by itself or cannot be started (1)."""
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
    except Exception as error:
        text = str(error) if isinstance(error, CliError | ServerError) else f"a fault of this program: {error!r}"
        errors.write(f"pair: {text}\n".encode())
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
    add = parser.add_argument
    add("--only", choices=["torchserve", "nginx"], help="run one of the two; the other runs elsewhere")
    add("--model-store", type=Path, default=Path("model_store"), help="folder of archives")
    add("--models", nargs="+", metavar="NAME.mar", help="archives in the store (default: all)")
    add("--port", type=int, default=8080, help="of TorchServe's inference on loopback (%(default)s)")
    add("--workers", type=int, help="per model (default: as mlvgm serve)")
    add("--timeout", type=float, default=1200, metavar="S", help="to wait for an answer (%(default)s)")
    add("--nginx-conf", type=Path, default=Path("/etc/mlvgm/nginx.conf"), metavar="FILE", help="(%(default)s)")
    ready = "a model that takes longer is not ready (%(default)s)"
    add("--ready-timeout", type=float, default=60, metavar="S", help=ready)
    hangs = "start TorchServe again when it neither answers nor computes for so long (%(default)s)"
    add("--hang-timeout", type=float, default=60, metavar="S", help=hangs)
    add("--drain", type=float, default=70, metavar="S", help="to answer what is left (%(default)s)")
    return parser
