"""The signals that stop or upgrade a server: noted when they come, and acted on where that is safe.

A handler that raises can do so anywhere: while a child is started, a lock is held, a folder is cleaned up. These do
nothing; the interpreter writes the number of a signal into a pipe, and the main thread reads it in `pause`. What comes
after the first that stops is never read.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
UPGRADE = signal.SIGUSR2

upgrade_requested = False
"""Set by `pause` when `UPGRADE` has come; whoever upgrades clears it."""

_pipe: int | None = None


class Stopped(Exception):
    """One of `STOPS` has come."""


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Within, in the main thread, `STOPS` and `UPGRADE` wait for `pause`."""
    global _pipe
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before_pipe, _pipe = _pipe, reading
    before_writing = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # nohup ignores SIGHUP, and so it stays.
    awaited = [n for n in (*STOPS, UPGRADE) if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in awaited}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_writing)
        _pipe = before_pipe
        os.close(reading)
        os.close(writing)


def pause(seconds: float) -> None:
    """Wait; a signal ends it early. Outside of `noted`, or in another thread, only wait.

    Raises:
        Stopped: see there.
    """
    global upgrade_requested
    if _pipe is None or threading.current_thread() is not threading.main_thread():
        time.sleep(seconds)
        return
    if not select.select([_pipe], [], [], seconds)[0]:
        return
    for number in os.read(_pipe, 1):
        if number == UPGRADE:
            upgrade_requested = True
        elif number in STOPS:
            raise Stopped(signal.Signals(number).name)


def end_by(seconds: float) -> None:
    """Have the kernel end this process after so many seconds, whatever it is stuck in; its children end with it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def leave(code: int) -> None:
    """End now: no thread that waits for a reader of our output is waited for."""
    os._exit(code)
