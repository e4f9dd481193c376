"""Write lines to a descriptor without ever waiting for its reader."""

import os
import queue
import select
import threading
from collections.abc import Callable

_HELD = 2000  # lines; of `LONGEST_LINE` bytes at most
LONGEST_LINE = 16_384


class Output:
    """Writes lines to ``descriptor`` in its own thread. Lines that do not fit into its buffer are dropped and counted.

    Args:
        complain: called with one line at the first error of the descriptor.
    """

    def __init__(self, descriptor: int, complain: Callable[[str], None] = lambda _: None) -> None:
        self._descriptor, self._complain = descriptor, complain
        self._lines: queue.Queue[bytes] = queue.Queue(_HELD)
        self._dropped = 0
        self._failed = False
        threading.Thread(target=self._write_on, daemon=True, name=f"output-{descriptor}").start()

    def write(self, line: bytes) -> None:
        """Add a line, with its line end; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1  # not exact, since several threads may write

    def flush(self, seconds: float) -> None:
        """Wait until all lines are written, at most ``seconds``."""
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
            except BlockingIOError:  # made non-blocking by another process that shares it
                select.select([], [self._descriptor], [])
