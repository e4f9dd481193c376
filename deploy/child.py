"""A program as our child: it ends when we do, its output never makes it wait, and one place waits for its end."""

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
_ORPHANS_SECONDS = 1.0  # and no more: a container may have nobody who reaps them


class Child:
    """``command`` in a session of its own, so that no Ctrl-C reaches it but through us.

    Args:
        dies_by: the signal that the kernel sends it when this process ends in whatever way; 0 lets it live on. The
            kernel goes by the thread that started it, so only the main thread starts what shall not live on.
        output: gets its lines; or a file that it writes itself.
        keeps: descriptors that stay open in it.
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
        return self._process.poll() is not None

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(seconds, 0.0))
        return self.ended()

    def end(self, number: int, seconds: float) -> None:
        """Ask it by a signal to end, and after so many seconds kill it, with all that it has left behind."""
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
    """Whether there is any process of the session that the process ``leader`` has begun."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def kill_group(leader: int) -> None:
    """End every process of the session that the process ``leader`` has begun, even if it is gone itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
