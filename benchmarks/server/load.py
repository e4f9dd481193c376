"""Load of two kinds: closed, where so many clients each wait for their answer, and open, where requests just come.

Latency is counted from the moment when a request should have been sent: a server that stalls is not let off the
requests that waited for it.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.server.call import Call, Target
from benchmarks.server.connection import Connection, RawReply

MOST_CONNECTIONS = 1000
REFUSALS = (429, 503)
"""Statuses of a server that says at once that it has too much to do."""
_PAUSE = 0.05  # of a client after a failure: clients that do not wait would measure how fast failures come


@dataclass
class LoadResult:
    """What became of the requests of one load, in the order in which they ended. Times are of `time.monotonic`.

    Attributes:
        due, sent, done: when each should have been sent, was, and had its answer.
        status: of HTTP, or of `benchmarks.server.connection`.
        right: whether the answer was the one that the call should get.
        wrong: the first calls that were not, with their status and body.
        cpu_seconds: what the generator itself took.
    """

    due: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    valid: list[bool] = field(default_factory=list)
    wrong: list[tuple[str, int, bytes]] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.due)

    def add(self, call: Call, due: float, sent: float, reply: RawReply) -> None:
        right = call.is_right(*reply)
        self.due.append(due)
        self.sent.append(sent)
        self.done.append(time.monotonic())
        self.status.append(reply.status)
        self.right.append(right)
        self.valid.append(call.label is not None)
        if not right and len(self.wrong) < 20:
            self.wrong.append((call.kind, reply.status, reply.body[:200]))

    @property
    def refused(self) -> int:
        """Requests that the server had no room for."""
        return self.right.count(False) - self.failed

    @property
    def failed(self) -> int:
        """Requests that were neither answered rightly nor refused."""
        return sum(not right and status not in REFUSALS for right, status in zip(self.right, self.status, strict=True))

    @property
    def latencies(self) -> NDArray[np.float64]:
        """Seconds, of the right answers alone."""
        return (np.array(self.done) - np.array(self.due))[np.array(self.right, bool)]

    def per_second(self, burst: int = 1) -> float:
        """Right answers a second, where ``burst`` come together: from the first burst to the last."""
        ends = np.array(self.done)[np.array(self.right, bool)]
        if len(ends) <= burst:
            return 0.0
        return float((len(ends) - burst) / max(ends[-1] - ends[burst - 1], 1e-9))


async def closed(
    target: Target, calls: Iterable[Call], clients: int, timeout: float = 120.0, result: LoadResult | None = None
) -> LoadResult:
    """Send ``calls`` from so many clients, each on a connection of its own, until there are no more of them.

    Whoever wants to look on gives the ``result`` that are to be filled.
    """
    result = LoadResult() if result is None else result
    remaining = iter(calls)

    async def client() -> None:
        connection = Connection(target.address, timeout, target.tls)
        for call in remaining:
            due = time.monotonic()
            reply = await ask(target, connection, call)
            result.add(call, due, due, reply)
            if reply.status <= 0 or reply.status >= 500:
                await asyncio.sleep(_PAUSE)
        connection.close()

    begun = time.process_time()
    await asyncio.gather(*(client() for _ in range(clients)))
    result.cpu_seconds = time.process_time() - begun
    return result


async def open_load(
    target: Target, calls: Iterator[Call], arrivals: Sequence[float], timeout: float = 120.0
) -> LoadResult:
    """Send one of ``calls`` at each of the ``arrivals``, in seconds from now, whatever became of the ones before."""
    result = LoadResult()
    idle: list[Connection] = []
    places = asyncio.Semaphore(MOST_CONNECTIONS)

    async def send(call: Call, due: float) -> None:
        async with places:
            connection = idle.pop() if idle else Connection(target.address, timeout, target.tls)
            sent = time.monotonic()
            reply = await ask(target, connection, call)
            idle.append(connection)
        result.add(call, due, sent, reply)

    begun_cpu, begun = time.process_time(), time.monotonic()
    running: set[asyncio.Task[None]] = set()
    for arrival in arrivals:
        wait = begun + arrival - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(send(next(calls), begun + arrival))
        running.add(task)
        task.add_done_callback(running.discard)
    if running:
        await asyncio.gather(*running)
    result.cpu_seconds = time.process_time() - begun_cpu
    for connection in idle:
        connection.close()
    return result


async def ask(target: Target, connection: Connection, call: Call) -> RawReply:
    """The answer to ``call``; with a newer key once more, where the old one had expired."""
    request = target.request(call)
    reply = await connection.ask(request)
    if reply.status == 400 and call.start is None and target.refresh_key(request, reply.body):
        reply = await connection.ask(target.request(call))
    return reply


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Moments in ``seconds`` at which independent clients send, ``rate`` a second on average."""
    rng = np.random.default_rng(seed)
    moments = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 1.5) + 50))
    return [float(moment) for moment in moments[moments < seconds]]


def until(moment: float, calls: Iterator[Call]) -> Iterator[Call]:
    """``calls`` until `time.monotonic` passes ``moment``."""
    while time.monotonic() < moment:
        yield next(calls)


def percentiles(seconds: NDArray[np.float64], prefix: str = "") -> dict[str, Any]:
    """``p50_ms``, ``p90_ms``, ``p99_ms``; None where there is nothing to tell them from."""
    return {
        f"{prefix}p{share}_ms": float(np.percentile(seconds, share)) * 1000 if len(seconds) else None
        for share in (50, 90, 99)
    }


def show_wrong(where: str, result: LoadResult, say: Callable[[str], None]) -> None:
    """The first request that was neither answered rightly nor refused."""
    for kind, status, body in [wrong for wrong in result.wrong if wrong[1] not in REFUSALS][:1]:
        say(f"{where}: not the right answer to a {kind} request: {status} {body[:100]!r}")


def in_words(row: Mapping[str, Any]) -> str:
    """A row of an open load as a line of progress."""
    if row["p50_ms"] is None:
        return f"{row['offered_per_s']:.4g}/s offered, no right answer"
    times = f"{row['p50_ms']:.0f} ms median, {row['p99_ms']:.0f} ms at 99 %"
    return f"{row['offered_per_s']:.4g}/s offered, {row['achieved_per_s']:.4g}/s answered, {times}"
