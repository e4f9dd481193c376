"""How much of the machine other programs took during a measurement."""

import contextlib
import time

import psutil


class BackgroundLoad:
    """CPU time that neither this process nor any that it has started has used, counted from when this is made."""

    def __init__(self) -> None:
        self._began = _now()

    def cores(self) -> float:
        """How many cores others kept busy on average."""
        seconds, busy, own = (now - began for now, began in zip(_now(), self._began, strict=True))
        return max(0.0, (busy - own) / seconds)


def _now() -> tuple[float, float, float]:
    """Seconds that have passed, that all cores have worked, and that they have worked for us."""
    times, me, own = psutil.cpu_times(), psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            own += sum(process.cpu_times()[:2])
    return time.monotonic(), times.user + times.nice + times.system, own
