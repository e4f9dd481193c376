"""The workers of a server under load: whether they live, and how much memory they hold."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from benchmarks.server.servers import Deployment

_INTERVAL = 0.25


class Watch:
    """Looks at the workers of a deployment four times a second.

    Attributes:
        deaths: workers that have ended so far.
        memory: (seconds since the start, resident bytes of all workers), in order.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.deaths = 0
        self.memory: list[tuple[float, int]] = []
        self._deployment, self._began = deployment, time.monotonic()
        self._workers: list[Any] = deployment.workers()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Watch":
        self._look()
        self._task = asyncio.create_task(self._go_on())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        self._look()

    def findings(self) -> dict[str, Any]:
        """``worker_deaths``, ``memory_growth`` after the first tenth of the time, and ``memory``."""
        since = self.memory[-1][0] / 10
        return {"worker_deaths": self.deaths, "memory_growth": growth(self.memory, since), "memory": self.memory}

    def _look(self) -> None:
        sizes = [_resident(worker) for worker in self._workers]
        alive = [size for size in sizes if size is not None]
        self.memory.append((time.monotonic() - self._began, sum(alive)))
        if len(alive) < len(sizes):
            self.deaths += len(sizes) - len(alive)
            self._workers = self._deployment.workers()

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL)
            self._look()


def growth(memory: Sequence[tuple[float, int]], since: float) -> float | None:
    """How much more is held at the end than at the first look from ``since`` on, as a share of that."""
    first = next((held for moment, held in memory if moment >= since), 0)
    return memory[-1][1] / first - 1 if first else None


def in_words(findings: Mapping[str, Any]) -> str:
    """`Watch.findings` without a full stop."""
    grown = findings["memory_growth"]
    share = "not known" if grown is None else f"{grown:+.1%}"
    return f"Workers lost: {findings['worker_deaths']}. Memory of the workers, from the first tenth to the end: {share}"


def _resident(worker: Any) -> int | None:
    try:
        return int(worker.memory_info().rss) if worker.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None
