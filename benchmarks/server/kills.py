"""Workers killed under load: how long until the next right answer, and what becomes of every request meanwhile."""

import asyncio
import collections
import time
from collections.abc import Iterator
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.server import load
from benchmarks.server.call import Call
from benchmarks.server.connection import SILENT
from benchmarks.server.deployment import Deployment
from benchmarks.server.saturation import Say
from benchmarks.server.workload import Workload

CLIENTS = 8
TIMEOUT = 180.0
_CALM = 2.0  # seconds of service between two kills


def kill(workload: Workload, deployment: Deployment, count: int, say: Say) -> dict[str, Any]:
    """SIGKILL all workers ``count`` times while clients go on asking.

    Returns:
        ``recovery_s``: of each kill, until the first right answer to a request that was sent after it, None where none
        came within `TIMEOUT`; ``requests``, ``right``, ``wrong`` answers with status 200, ``errors`` by status (see
        `benchmarks.server.connection` for those below 100), and ``lost``: requests without any end.
    """
    return asyncio.run(_run(deployment, workload.calls(), count, say))


async def _run(deployment: Deployment, calls: Iterator[Call], count: int, say: Say) -> dict[str, Any]:
    result, stop = load.LoadResult(), asyncio.Event()
    asking = asyncio.create_task(
        load.closed(deployment, _until_set(stop, calls), CLIENTS, TIMEOUT, result),
    )
    recoveries: list[float | None] = []
    while len(recoveries) < count:
        await _right_answer_since(time.monotonic(), result)
        await asyncio.sleep(_CALM)
        killed = time.monotonic()
        for worker in deployment.workers():
            try:
                worker.kill()
            except psutil.NoSuchProcess:
                continue
        moment = await _right_answer_since(killed, result)
        recoveries.append(None if moment is None else moment - killed)
        say(f"kill {len(recoveries)} of {count}: " + ("no recovery" if moment is None else f"{moment - killed:.1f} s"))
        if moment is None:
            break
    stop.set()
    await asking
    failures = [
        status for status, right in zip(result.status, result.right, strict=True) if not right and status != 200
    ]
    return {
        "recovery_s": recoveries,
        "requests": len(result),
        "right": sum(result.right),
        "wrong": len(result) - sum(result.right) - len(failures),
        "errors": dict(sorted(collections.Counter(map(str, failures)).items())),
        "lost": failures.count(SILENT),
    }


def _until_set(stop: asyncio.Event, calls: Iterator[Call]) -> Iterator[Call]:
    while not stop.is_set():
        yield next(calls)


async def _right_answer_since(moment: float, result: load.LoadResult) -> float | None:
    """When the first right answer came to a request that was sent after ``moment``."""
    seen = len(result)
    while time.monotonic() < moment + TIMEOUT:
        for i in range(seen, len(result)):
            if result.right[i] and result.sent[i] > moment:
                return result.done[i]
        seen = len(result)
        await asyncio.sleep(0.01)
    return None
