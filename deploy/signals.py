"""The signals that ask a program to stop, so that it does so once, in order, and leaves no child behind."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

stopping = threading.Event()
"""Set once one of `STOPS` has come; a `KeyboardInterrupt` can get lost in a destructor, this cannot."""


def stop_once() -> None:
    """From now on the first of `STOPS` raises `KeyboardInterrupt`, and later ones do not disturb what follows it."""
    for number in STOPS:
        signal.signal(number, _stop)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    stopping.set()
    for number in STOPS:
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let signals wait: between the start of a child and its being known, one would leave the child behind.

    Only the main thread may, and need: signals reach no other.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in STOPS}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
    if came:
        signal.raise_signal(came[0])
