"""Lines for a descriptor whose reader may stand still: nobody here waits for it."""

import os
import queue
import select
import threading
from collections.abc import Callable

_HELD = 2000  # lines; of `LONGEST_LINE` bytes at most
LONGEST_LINE = 16_384


class Output:
    """Writes lines to ``descriptor`` from a thread of its own. What does not fit is dropped and counted.

    Args:
        complain: is told in a line when the descriptor cannot be written, the first time.
    """

    def __init__(self, descriptor: int, complain: Callable[[str], None] = lambda _: None) -> None:
        self._descriptor, self._complain = descriptor, complain
        self._lines: queue.Queue[bytes] = queue.Queue(_HELD)
        self._dropped = 0
        self._failed = False
        threading.Thread(target=self._write_on, daemon=True, name=f"output-{descriptor}").start()

    def write(self, line: bytes) -> None:
        """Take a line, with its end; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1  # of several threads; one more or less is no matter

    def flush(self, seconds: float) -> None:
        """Wait until all is written, for so many seconds at most."""
        waiting = threading.Thread(target=self._lines.join, daemon=True)
        waiting.start()
        waiting.join(seconds)

    def _write_on(self) -> None:
        while True:
            line = self._lines.get()
            if self._dropped and self._lines.qsize() < _HELD // 2:
                count, self._dropped = self._dropped, 0
                line += b"pair: %d lines of the log were dropped: nobody read them\n" % count
            try:
                self._write(line)
            except OSError as error:
                if not self._failed:
                    self._failed = True
                    self._complain(f"the log is lost: {error.strerror}")
            self._lines.task_done()

    def _write(self, line: bytes) -> None:
        while line:
            try:
                line = line[os.write(self._descriptor, line) :]
            except BlockingIOError:  # whoever shares it has made it so
                select.select([], [self._descriptor], [])
