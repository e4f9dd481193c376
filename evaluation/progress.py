"""Progress bars (tqdm) on the error stream. Short work shows none, and log files get only a few lines."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(total: int, what: str, unit: str = "image") -> "tqdm[Any]":
    """A bar, used as a context manager and advanced by ``update``."""
    seconds = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, desc=what, unit=f" {unit}s", mininterval=seconds, delay=seconds, leave=False)


def track(items: Sequence[T], what: str, unit: str = "image") -> Iterator[T]:
    """Yield ``items`` while a bar shows how many are done and how long the rest will take."""
    with bar(len(items), what, unit) as shown:
        for item in items:
            yield item
            shown.update()


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line, on standard output by default, without breaking a bar."""
    file = file or sys.stdout
    if sys.stderr.isatty():
        tqdm.write(line, file)
    else:
        print(line, file=file)
    file.flush()


def clocked() -> Callable[[str], None]:
    """A `say` that puts the seconds since now before each line."""
    began = time.monotonic()
    return lambda line: say(f"[{time.monotonic() - began:5.1f} s] {line}")
