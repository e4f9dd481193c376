"""Workers killed under load: how long until the next correct answer, and what becomes of every request meanwhile."""

import asyncio
import collections
import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from benchmarks.server import load
from benchmarks.server.calls import SILENT, Call
from benchmarks.server.load import Say
from benchmarks.server.servers import Deployment
from benchmarks.server.workload import Workload

CLIENTS = 8
TIMEOUT = 180.0
_CALM = 2.0  # seconds of service between two kills


def run(count: int, workload: Workload, deployment: Deployment, _: float, say: Say) -> dict[str, Any]:
    """SIGKILL all workers ``count`` times while clients go on asking.

    Returns:
        ``recovery_s``: of each kill, until the first correct answer to a request that was sent after it, None where
        none came within `TIMEOUT`; ``requests``, ``correct``, ``wrong`` answers with status 200, ``errors`` by status
        (see `benchmarks.server.calls` for those below 100), and ``lost``: requests without any end.
    """
    return asyncio.run(_kill(deployment, workload.calls(), count, say))


def section(found: Mapping[str, Any]) -> str:
    """What `run` found, for the report."""
    seconds = ", ".join("never" if value is None else f"{value:.1f}" for value in found["recovery_s"])
    return (
        f"## Killed workers\n\nSeconds from each kill of all workers to the next correct answer: {seconds}. Of "
        f"{found['requests']} requests {found['correct']} were answered correctly, {found['wrong']} wrongly; "
        f"{sum(found['errors'].values())} got an error, {found['lost']} of these hung."
    )


async def _kill(deployment: Deployment, calls: Iterator[Call], count: int, say: Say) -> dict[str, Any]:
    result, stop = load.LoadResult(), asyncio.Event()
    asking = asyncio.create_task(
        load.closed_load(deployment.endpoint, _until_set(stop, calls), CLIENTS, TIMEOUT, result),
    )
    recoveries: list[float | None] = []
    while len(recoveries) < count and None not in recoveries:
        await _correct_answer_since(time.monotonic(), result)
        await asyncio.sleep(_CALM)
        killed = time.monotonic()
        for worker in deployment.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        moment = await _correct_answer_since(killed, result)
        recoveries.append(None if moment is None else moment - killed)
        after = "no correct answer any more" if moment is None else f"a correct answer after {moment - killed:.1f} s"
        say(f"workers killed, {len(recoveries)} of {count}: {after}")
    stop.set()
    await asking
    failures = [answer.status for answer in result.answers if not answer.correct and answer.status != 200]
    correct = sum(answer.correct for answer in result.answers)
    return {
        "recovery_s": recoveries,
        "requests": len(result.answers),
        "correct": correct,
        "wrong": len(result.answers) - correct - len(failures),
        "errors": dict(sorted(collections.Counter(map(str, failures)).items())),
        "lost": failures.count(SILENT),
    }


def _until_set(stop: asyncio.Event, calls: Iterator[Call]) -> Iterator[Call]:
    while not stop.is_set():
        yield next(calls)


async def _correct_answer_since(moment: float, result: load.LoadResult) -> float | None:
    """When the first correct answer came to a request that was sent after ``moment``."""
    seen = len(result.answers)
    while time.monotonic() < moment + TIMEOUT:
        for answer in result.answers[seen:]:
            if answer.correct and answer.sent > moment:
                return answer.done
        seen = len(result.answers)
        await asyncio.sleep(0.01)
    return None
