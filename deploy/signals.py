"""The signals that stop or upgrade a server take effect only at safe points of the program.

A signal handler that raises can interrupt anything: starting a child, holding a lock, cleaning up a folder. These
handlers do nothing; the interpreter writes the number of a signal to a pipe, which the main thread reads in `pause`.
Signals after the first one that stops the server are ignored.
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
"""Set by `pause` after the signal `UPGRADE`, and cleared by the upgrade."""

_pipe: int | None = None


class Stopped(Exception):
    """One of the signals `STOPS` has arrived."""


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """In this context, in the main thread, `STOPS` and `UPGRADE` take effect only in `pause`."""
    global _pipe
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before_pipe, _pipe = _pipe, reading
    before_writing = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # under nohup, SIGHUP stays ignored.
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
    """Wait until ``seconds`` have passed or a signal arrives. Outside of `noted`, or in another thread, only wait.

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
    """Have the kernel end this process and its children after ``seconds``, even if it hangs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def leave(code: int) -> None:
    """Exit at once, without waiting for threads that write the output."""
    os._exit(code)
