"""A line of progress for long work, on the error stream: rewritten in place on a terminal, seldom in a log."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 15.0


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield ``items`` while showing how many are done and how many seconds are left, as far as pace tells."""
    terminal = sys.stderr.isatty()
    interval = _TERMINAL_SECONDS if terminal else _LOG_SECONDS
    begun = shown = time.monotonic()
    for done, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - shown >= interval:
            shown = now
            left = (now - begun) / (done + 1) * (len(items) - done - 1)
            line = f"{what} {done + 1}/{len(items)}, {left:.0f} s left"
            print(f"\r{line:<78}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
    if terminal and shown > begun:
        print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)
