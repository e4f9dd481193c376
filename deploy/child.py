"""Child processes that end with their parent, and whose output never blocks them."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from deploy.output import LONGEST_LINE, Output

_LAUNCH = Path(__file__).with_name("launch.py")
_KILL_SECONDS = 10.0
_ORPHANS_SECONDS = 1.0  # not longer: in a container, orphans may never be reaped


class Child:
    """``command`` in its own session, so that Ctrl-C does not reach it directly.

    Args:
        dies_by: the signal that the kernel sends it when this process ends, in whatever way; 0 for none. The kernel
            refers to the thread that started it, so only the main thread may start such a child.
        output: takes its lines; or a file, to which it writes itself.
        keeps: descriptors that it inherits.
    """

    def __init__(
        self,
        command: Sequence[str],
        output: "Output | IO[bytes]",
        dies_by: int = 0,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        keeps: Sequence[int] = (),
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            dies_by = 0
        launch = [sys.executable, "-I", "-S", str(_LAUNCH), str(int(dies_by)), str(os.getpid())]
        self.lines: deque[str] = deque(maxlen=200)
        """The last that it has written, where an `Output` takes them."""
        self._process = subprocess.Popen(
            [*launch, *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if isinstance(output, Output) else output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=keeps,
        )
        self.pid = self._process.pid
        if isinstance(output, Output):
            threading.Thread(target=self._pass_on, args=(output,), daemon=True).start()

    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def send(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Whether it ends within ``seconds``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(seconds, 0.0))
        return self.ended()

    def end(self, number: int, seconds: float) -> None:
        """Send a signal to end it, and after ``seconds`` kill it and all processes of its session."""
        self.send(number)
        self.wait(seconds)
        kill_group(self.pid)
        self.wait(_KILL_SECONDS)
        deadline = time.monotonic() + _ORPHANS_SECONDS
        while group_exists(self.pid) and time.monotonic() < deadline:
            time.sleep(0.01)

    def _pass_on(self, output: Output) -> None:
        assert self._process.stdout
        while line := self._process.stdout.readline(LONGEST_LINE):
            self.lines.append(line.decode(errors="replace").rstrip())
            output.write(line if line.endswith(b"\n") else line + b"\n")


def group_exists(leader: int) -> bool:
    """Whether any process of the session of the process ``leader`` exists."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def kill_group(leader: int) -> None:
    """Kill every process of the session of the process ``leader``, which may have ended itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
