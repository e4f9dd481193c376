"""TorchServe with nginx in front of it as one program: started in order, drained in order, never half of it left.

    python -m deploy.pair --models road-signs.mar                  both
    python -m deploy.pair --only torchserve --models road-signs.mar      for a container of its own, and
    python -m deploy.pair --only nginx                             for the one beside it, with $MLVGM_STATE in common

SIGTERM and Ctrl-C stop it: nginx takes nothing new and answers what it has, then TorchServe is stopped. If either of
the two ends by itself, so does the other, and the exit code is 1: start it again. nginx is reloaded whenever its
folder changes (certificate, clients' keys), and whenever TorchServe's key does.

SIGUSR2 upgrades it: the archives are read anew by a second TorchServe on the five ports after those of the first (and
the next time the other way round). When it has answered, nginx sends what comes to it, and when the first has answered
what it still had, it is stopped. If the new one does not come up, the old one goes on.
"""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.errors import CliError
from deploy.nginx import Front
from deploy.server import PORTS
from deploy.signals import stop_once, stopping
from deploy.torchserve import Back
from deploy.workers import chosen, sizes_of
from handlers.client import ServerError

LOOK_EVERY_S = 0.5

upgrading = threading.Event()
"""Set when SIGUSR2 has come."""


class Pair:
    """Both, or one of them beside the other, as the ``options`` of `parser` say."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._back = Back(options.port)
        self._backs = [self._back]  # and the one that replaces it, or is being replaced by it
        self._front = Front(options.nginx_conf, self._back, options.ready_timeout)

    def start(self) -> None:
        if self._options.only != "nginx":
            self._start(self._back)
            _say("TorchServe answers")
        if self._options.only != "torchserve":
            self._await_key()
            self._front.start()
            _say("nginx is started")

    def stay(self) -> int:
        """Look after both until a signal comes (0) or one of them ends (1)."""
        complaint = ""
        while not stopping.is_set():
            if self._back.ended() or self._front.ended():
                _say(f"{'TorchServe' if self._back.ended() else 'nginx'} has ended by itself")
                return 1
            try:
                self._look_after()
                complaint = ""
            except (ServerError, OSError, ValueError, KeyError) as error:
                # TorchServe is starting anew beside us, or a file is being replaced.
                if complaint != (complaint := str(error)):
                    _say(complaint)
            if upgrading.is_set():
                upgrading.clear()
                self._upgrade()
            time.sleep(LOOK_EVERY_S)
        return 0

    def stop(self) -> None:
        self._front.drain(self._options.drain)
        if self._options.only != "nginx":
            for back in self._backs:
                back.stop()
        _say("stopped")

    def _start(self, back: Back) -> None:
        options = self._options
        names = options.models or sorted(path.name for path in options.model_store.glob("*.mar"))
        if not names:
            raise CliError(f"{options.model_store}: no archive there")
        archives = [options.model_store / name for name in names]
        workers, threads = chosen(options.workers, 0, sizes_of(archives))
        back.start(archives, workers, options.timeout, threads)

    def _await_key(self) -> None:
        deadline = time.monotonic() + self._options.timeout
        while True:
            try:
                self._back.client().key("inference")
                return
            except ServerError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK_EVERY_S)

    def _look_after(self) -> None:
        if self._options.only != "nginx":
            self._back.renew_if_due()
        if self._options.only != "torchserve":
            self._front.reload_if_changed()

    def _upgrade(self) -> None:
        if self._options.only:
            _say("only a pair can be upgraded: start this container anew")
            return
        _say("upgrading: TorchServe is started with the archives as they are now")
        first = self._options.port
        old, new = self._back, Back(first + PORTS if self._back.port == first else first)
        self._backs.append(new)
        try:
            self._start(new)
            self._front.switch(new, self._options.drain)
        except (CliError, ServerError) as error:
            outcome = f"not upgraded, the old one goes on: {error}"
            old, new = new, old
        else:
            outcome = "upgraded"
        self._back = new
        old.stop()
        self._backs.remove(old)
        _say(outcome)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the pair until a signal stops it (0), or one of the two ends by itself or cannot be started (1)."""
    options = parser().parse_args(arguments)
    stop_once()
    signal.signal(signal.SIGUSR2, lambda *_: upgrading.set())
    pair = Pair(options)
    try:
        pair.start()
        return pair.stay()
    except KeyboardInterrupt:
        return 0
    except (CliError, ServerError) as error:
        _say(str(error))
        return 1
    finally:
        pair.stop()


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
