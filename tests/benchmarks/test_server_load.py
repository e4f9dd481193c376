"""The load generator against a small HTTP server of the test's own: what it counts, and from when."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import repeat

import numpy as np
import pytest

from benchmarks.server import load
from benchmarks.server.call import Call, head
from benchmarks.server.connection import CLOSED, SILENT, Connection
from benchmarks.server.watch import growth

VALID = Call(b"image", label=3)
RIGHT = json.dumps({"index": 3}).encode()


class Server:
    """Answers each request with what ``behave`` writes; a `Target`."""

    def __init__(self, behave: Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]) -> None:
        self._behave = behave
        self.connections, self.tls = 0, None
        self.key = b"old"

    async def __aenter__(self) -> "Server":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = self._server.sockets[0].getsockname()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                start = await reader.readuntil(b"\r\n\r\n")
                length = int(start.split(b"Content-Length: ")[1].split(b"\r\n")[0])
                await self._behave(start + await reader.readexactly(length), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def request(self, call: Call) -> bytes:
        return head("POST / HTTP/1.1", "h", b"Key: %s\r\n" % self.key, call.headers, len(call.body)) + call.body

    def refresh_key(self, request: bytes, body: bytes) -> bool:
        self.key = b"new"
        return b"InvalidKeyException" in body


def reply(body: bytes = RIGHT, status: int = 200, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%s\r\n%s" % (status, len(body), more, body)


async def answer(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(reply())


def closed(behave: Callable[[bytes, asyncio.StreamWriter], Awaitable[None]], calls: list[Call], **more: float):
    async def run() -> tuple[load.LoadResult, Server]:
        async with Server(behave) as server:
            return await load.closed(server, calls, 2, **more), server

    return asyncio.run(run())


def test_connections_are_kept() -> None:
    result, server = closed(answer, [VALID] * 50)
    assert (len(result), sum(result.right), server.connections) == (50, 50, 2)


def test_answers_may_come_in_pieces() -> None:
    async def slowly(_: bytes, writer: asyncio.StreamWriter) -> None:
        for byte in reply():
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    assert all(closed(slowly, [VALID] * 4)[0].right)


def test_a_server_that_closes_is_asked_on_a_new_connection() -> None:
    async def refuse(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(b"{}", 400, b"connection: close\r\n"))

    result, server = closed(refuse, [Call(b"", kind="empty")] * 6)
    assert result.status == [400] * 6
    assert all(result.right), "a refusal is what a hostile request should get"
    assert server.connections == 6


@pytest.mark.parametrize(
    ("body", "status", "call", "right"),
    [
        (RIGHT, 200, VALID, True),
        (b'{"index": 4}', 200, VALID, False),
        (b"no JSON", 200, VALID, False),
        (RIGHT, 503, VALID, False),
        (RIGHT, 200, Call(b""), False),
        (b"", 413, Call(b""), True),
        (b"", 500, Call(b""), False),
        (b"", 500, Call(b"", also_accept=500), True),
    ],
)
def test_what_is_right(body: bytes, status: int, call: Call, right: bool) -> None:
    async def say(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(body, status))

    result, _ = closed(say, [call])
    assert result.right == [right]
    assert bool(result.wrong) is not right
    assert (result.refused, result.failed) == (status == 503, not right and status != 503)


def test_what_never_comes_is_told_from_what_is_cut() -> None:
    async def cut(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply()[:30])
        writer.close()

    async def nothing(*_: object) -> None:
        return

    assert closed(cut, [VALID])[0].status == [CLOSED]
    assert closed(nothing, [VALID], timeout=0.1)[0].status == [SILENT]


def test_nobody_there() -> None:
    async def ask() -> int:
        async with Server(answer) as server:
            address = server.address
        return (await Connection(address, 1).ask(b"")).status

    assert asyncio.run(ask()) == CLOSED


def test_an_expired_key_is_no_wrong_answer() -> None:
    async def check(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply() if b"Key: new" in request else reply(b"InvalidKeyException", 400))

    assert closed(check, [VALID] * 3)[0].status == [200] * 3


def test_latency_is_counted_from_when_a_request_was_due() -> None:
    """A server that stalls once for 0.3 s delays all that were due meanwhile, and nobody may forget it."""
    stalled = []

    async def stall(_: bytes, writer: asyncio.StreamWriter) -> None:
        if not stalled:
            stalled.append(True)
            time.sleep(0.3)  # the whole loop, and so the generator too
        writer.write(reply())

    async def run() -> load.LoadResult:
        async with Server(stall) as server:
            return await load.open_load(server, repeat(VALID), [0.01 * i for i in range(20)])

    result = asyncio.run(run())
    assert all(result.right)
    assert len(result) == 20
    assert np.median(result.latencies) > 0.15
    assert np.median(np.array(result.done) - np.array(result.sent)) < 0.15


def test_requests_come_whatever_became_of_the_ones_before() -> None:
    async def slow(_: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        writer.write(reply())

    async def run() -> tuple[load.LoadResult, int]:
        async with Server(slow) as server:
            return await load.open_load(server, repeat(VALID), [0.0] * 30), server.connections

    result, connections = asyncio.run(run())
    assert connections == 30
    assert result.latencies.max() < 1


def test_random_arrivals() -> None:
    moments = load.poisson(200, 10, seed=1)
    assert moments == load.poisson(200, 10, seed=1) != load.poisson(200, 10, seed=2)
    assert moments == sorted(moments)
    assert moments[0] > 0
    assert moments[-1] < 10
    assert len(moments) == pytest.approx(2000, rel=0.1)
    gaps = np.diff(moments)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1), "independent: as irregular as can be"


def test_bursts_are_counted_from_end_to_end() -> None:
    result = load.LoadResult(done=[1, 1, 1, 2, 2, 2, 3, 3, 3], right=[True] * 9)
    assert result.per_second(burst=3) == pytest.approx(3)
    assert load.LoadResult(done=[1], right=[True]).per_second() == 0


def test_percentiles() -> None:
    assert load.percentiles(np.arange(101) / 1000) == pytest.approx({"p50_ms": 50, "p90_ms": 90, "p99_ms": 99})
    assert load.percentiles(np.array([]), "refusal_")["refusal_p99_ms"] is None


def test_calls_stop_when_time_is_up() -> None:
    calls: Iterator[Call] = load.until(time.monotonic() + 0.05, repeat(VALID))
    begun = time.monotonic()
    assert sum(1 for _ in calls) > 1
    assert time.monotonic() - begun < 1


def test_growth_begins_after_the_first_tenth() -> None:
    memory = [(0.0, 100), (1.0, 200), (2.0, 205), (9.0, 210)]
    assert growth(memory, since=0.5) == pytest.approx(0.05)
    assert growth(memory, since=10) is None
