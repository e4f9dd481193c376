"""Turns of workers on the same cores: one computes, the others read requests and answer.

Two that compute at once, each with a thread for every core, wait for each other's threads: both batches take twice as
long as one, and neither is done first.
"""

import fcntl
import os
from pathlib import Path
from types import TracebackType


class Turns:
    """A ``with`` block that only one process at a time is in, of all that name the same ``folder``.

    The lock is the folder's own: nothing is written, and a process that dies gives its turn back.

    Raises:
        OSError: there is no such folder, or its file system has no locks.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = os.open(folder, os.O_RDONLY)
        try:
            with self:
                pass
        except OSError:
            os.close(self._folder)
            raise

    def __enter__(self) -> None:
        fcntl.flock(self._folder, fcntl.LOCK_EX)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fcntl.flock(self._folder, fcntl.LOCK_UN)
