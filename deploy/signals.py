"""The signals that stop or upgrade a server: blocked, and fetched where it is safe to act on them.

No handler runs, so none can interrupt the start of a child, a lock or a cleanup. A signal waits in the kernel until the
main thread calls `pause`; what comes after the first that stops is never fetched.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
UPGRADE = signal.SIGUSR2

upgrade_requested = False
"""Set by `pause` when `UPGRADE` has come; whoever upgrades clears it."""

_awaited: tuple[signal.Signals, ...] = ()


class Stopped(Exception):
    """One of `STOPS` has come."""


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Within, `STOPS` and `UPGRADE` wait for `pause`. Before any thread is started: threads inherit what is blocked."""
    global _awaited
    # nohup ignores SIGHUP, and so it stays.
    _awaited = tuple(n for n in (*STOPS, UPGRADE) if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _awaited)
    try:
        yield
    finally:
        _awaited = ()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pause(seconds: float) -> None:
    """Wait; a signal ends it early. Outside of `blocked`, or in another thread, only wait.

    Raises:
        Stopped: see there.
    """
    global upgrade_requested
    if not _awaited or threading.current_thread() is not threading.main_thread():
        time.sleep(seconds)
        return
    info = signal.sigtimedwait(_awaited, seconds)
    if info is None:
        return
    if info.si_signo == UPGRADE:
        upgrade_requested = True
        return
    raise Stopped(signal.Signals(info.si_signo).name)


def end_by(seconds: float) -> None:
    """Have the kernel end this process after so many seconds, whatever it is stuck in; its children end with it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.setitimer(signal.ITIMER_REAL, seconds)


def leave(code: int) -> None:
    """End now: no thread that waits for a reader of our output is waited for."""
    os._exit(code)
