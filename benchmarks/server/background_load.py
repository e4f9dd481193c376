"""How much of the machine programs took that belong to no measurement."""

import contextlib
import time
from collections.abc import Iterable
from typing import Any

import psutil  # type: ignore[import-untyped]


class BackgroundLoad:
    """Counts from when it is made; ``ours`` are the processes that belong to the measurement, with all below them."""

    def __init__(self, ours: Iterable[Any]) -> None:
        self._ours = [psutil.Process(), *ours]
        self._begun = self._now()

    def cores(self) -> float:
        """How many cores others kept busy on average."""
        moment, busy, own = (now - begun for now, begun in zip(self._now(), self._begun, strict=True))
        return max(0.0, (busy - own) / moment)

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        family = {process for one in self._ours for process in (one, *one.children(recursive=True))}
        own = 0.0
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                own += sum(process.cpu_times()[:2])
        return time.monotonic(), times.user + times.nice + times.system, own
