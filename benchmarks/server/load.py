"""Closed load, where each client waits for its answer, and open load, where requests come whatever became of others.

Latency is counted from the moment when a request should have been sent: a server that stalls is charged for the
requests that had to wait meanwhile.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.server.calls import CLOSED, SILENT, Call, Connection, Endpoint, RawReply

MAX_CONNECTIONS = 1000
REFUSALS = (429, 503)
"""Statuses of a server that says at once that it has too much to do."""
_PAUSE = 0.05  # seconds a client waits after a failure, or the rate of failures would be measured

Say = Callable[[str], None]
"""Takes a line of progress."""


class Answer(NamedTuple):
    """What became of one request. Times are of `time.monotonic`; ``status`` as in `benchmarks.server.calls`."""

    due: float
    sent: float
    done: float
    status: int
    correct: bool
    valid: bool


_ROW = np.dtype([("due", "f8"), ("sent", "f8"), ("done", "f8"), ("status", "i4"), ("correct", "?"), ("valid", "?")])


@dataclass
class LoadResult:
    """What became of the requests of one load.

    Attributes:
        answers: in the order in which they came.
        wrong: kind, status and body of the first calls that were not answered correctly.
        cpu_seconds: what the load generator itself took.
    """

    answers: list[Answer] = field(default_factory=list)
    wrong: list[tuple[str, int, bytes]] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def add(self, call: Call, due: float, sent: float, reply: RawReply) -> None:
        """Record the reply that has just come."""
        correct = call.is_correct(*reply)
        self.answers.append(Answer(due, sent, time.monotonic(), reply.status, correct, call.label is not None))
        if not correct and len(self.wrong) < 20:
            self.wrong.append((call.kind, reply.status, reply.body[:200]))

    def table(self) -> NDArray[np.void]:
        """`answers` as an array with a field for each of an `Answer`."""
        return np.array(self.answers, _ROW)

    def counts(self) -> dict[str, int]:
        """``requests``; ``refused``, for which the server had no room; ``failed``: neither correct nor refused."""
        rows = self.table()
        refused = ~rows["correct"] & np.isin(rows["status"], REFUSALS)
        failed = ~rows["correct"] & ~refused
        return {"requests": len(rows), "refused": int(refused.sum()), "failed": int(failed.sum())}

    def latencies(self) -> NDArray[np.float64]:
        """Seconds, of the correct answers alone."""
        rows = self.table()
        return (rows["done"] - rows["due"])[rows["correct"]]

    def per_second(self, burst: int = 1) -> float:
        """Correct answers a second, where ``burst`` come together: from the first burst to the last."""
        rows = self.table()
        done = rows["done"][rows["correct"]]
        if len(done) <= burst:
            return 0.0
        return float((len(done) - burst) / max(done[-1] - done[burst - 1], 1e-9))

    def show_failure(self, where: str, say: Say) -> None:
        """Say which request was the first to fail."""
        for kind, status, body in [wrong for wrong in self.wrong if wrong[1] not in REFUSALS][:1]:
            say(f"{where}: wrong answer to a {kind} request: {status} {body[:100]!r}")


async def closed_load(
    endpoint: Endpoint, calls: Iterable[Call], clients: int, timeout: float = 120.0, result: LoadResult | None = None
) -> LoadResult:
    """Send ``calls`` from so many clients, each on its own connection, until there are no more calls.

    Args:
        timeout: seconds to wait for an answer.
        result: is filled and returned; give one to look at it while the load runs.
    """
    result = LoadResult() if result is None else result
    remaining = iter(calls)

    async def client() -> None:
        connection = Connection(endpoint, timeout)
        for call in remaining:
            due = time.monotonic()
            reply = await connection.send(call)
            result.add(call, due, due, reply)
            if reply.status in (CLOSED, SILENT, 429) or reply.status >= 500:
                await asyncio.sleep(_PAUSE)
        connection.close()

    began = time.process_time()
    await asyncio.gather(*(client() for _ in range(clients)))
    result.cpu_seconds = time.process_time() - began
    return result


async def open_load(
    endpoint: Endpoint, calls: Iterator[Call], arrivals: Iterable[float], timeout: float = 120.0
) -> LoadResult:
    """Send one of ``calls`` at each of the ``arrivals``, in seconds from now, whatever became of the ones before."""
    result = LoadResult()
    idle: list[Connection] = []
    places = asyncio.Semaphore(MAX_CONNECTIONS)

    async def send(call: Call, due: float) -> None:
        async with places:
            connection = idle.pop() if idle else Connection(endpoint, timeout)
            sent = time.monotonic()
            reply = await connection.send(call)
            idle.append(connection)
        result.add(call, due, sent, reply)

    began_cpu, began = time.process_time(), time.monotonic()
    tasks = []
    for arrival in arrivals:
        await asyncio.sleep(max(0.0, began + arrival - time.monotonic()))
        tasks.append(asyncio.create_task(send(next(calls), began + arrival)))
    await asyncio.gather(*tasks)
    result.cpu_seconds = time.process_time() - began_cpu
    for connection in idle:
        connection.close()
    return result


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Moments in ``seconds`` at which independent clients send, ``rate`` a second on average."""
    rng = np.random.default_rng(seed)
    moments = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 1.5) + 50))
    return [float(moment) for moment in moments[moments < seconds]]


def percentiles(seconds: NDArray[np.float64], prefix: str = "") -> dict[str, Any]:
    """``p50_ms``, ``p90_ms``, ``p99_ms``; None for no times."""
    return {
        f"{prefix}p{share}_ms": float(np.percentile(seconds, share)) * 1000 if len(seconds) else None
        for share in (50, 90, 99)
    }
