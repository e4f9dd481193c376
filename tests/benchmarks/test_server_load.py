"""The load generator against a small HTTP server of the test's own: what it counts, and from when."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from itertools import repeat

import numpy as np
import pytest

from benchmarks.server import load
from benchmarks.server.calls import CLOSED, SILENT, Call, Connection, Endpoint

VALID = Call(b"image", label=3)
CORRECT = json.dumps({"index": 3}).encode()


class Server:
    """Answers each request with what ``behave`` writes."""

    def __init__(self, behave: Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]) -> None:
        self._behave = behave
        self.connections = 0

    async def __aenter__(self) -> "Server":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.endpoint = Endpoint(self._server.sockets[0].getsockname()[1], "tiny", lambda: b"Key: k\r\n")
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


def reply(body: bytes = CORRECT, status: int = 200, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%s\r\n%s" % (status, len(body), more, body)


async def answer(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(reply())


def closed(behave: Callable[[bytes, asyncio.StreamWriter], Awaitable[None]], calls: list[Call], **more: float):
    async def run() -> tuple[load.LoadResult, Server]:
        async with Server(behave) as server:
            return await load.closed_load(server.endpoint, calls, 2, **more), server

    return asyncio.run(run())


def statuses(result: load.LoadResult) -> list[int]:
    return result.table()["status"].tolist()


def test_connections_are_kept() -> None:
    result, server = closed(answer, [VALID] * 50)
    assert result.counts() == {"requests": 50, "refused": 0, "failed": 0}
    assert result.table()["correct"].all()
    assert server.connections == 2


def test_answers_may_come_in_pieces() -> None:
    async def slowly(_: bytes, writer: asyncio.StreamWriter) -> None:
        for byte in reply():
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    assert closed(slowly, [VALID] * 4)[0].table()["correct"].all()


def test_a_server_that_closes_is_asked_on_a_new_connection() -> None:
    async def refuse(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(b"{}", 400, b"connection: close\r\n"))

    result, server = closed(refuse, [Call(b"", kind="empty")] * 6)
    assert statuses(result) == [400] * 6
    assert result.table()["correct"].all(), "a refusal is what a hostile request should get"
    assert server.connections == 6


@pytest.mark.parametrize(
    ("body", "status", "call", "correct"),
    [
        (CORRECT, 200, VALID, True),
        (b'{"index": 4}', 200, VALID, False),
        (b"no JSON", 200, VALID, False),
        (CORRECT, 503, VALID, False),
        (CORRECT, 200, Call(b""), False),
        (b"", 413, Call(b""), True),
        (b"", 500, Call(b""), False),
        (b"", 500, Call(b"", also_accept=500), True),
    ],
)
def test_what_is_correct(body: bytes, status: int, call: Call, correct: bool) -> None:
    async def say(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(body, status))

    result, _ = closed(say, [call])
    assert result.table()["correct"].tolist() == [correct]
    assert bool(result.wrong) is not correct
    refused = status == 503
    assert result.counts() == {"requests": 1, "refused": refused, "failed": not correct and not refused}


def test_what_never_comes_is_told_from_what_is_cut() -> None:
    async def cut(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply()[:30])
        writer.close()

    async def nothing(*_: object) -> None:
        return

    assert statuses(closed(cut, [VALID])[0]) == [CLOSED]
    assert statuses(closed(nothing, [VALID], timeout=0.1)[0]) == [SILENT]


def test_nobody_there() -> None:
    async def ask() -> int:
        async with Server(answer) as server:
            endpoint = server.endpoint
        return (await Connection(endpoint, 60).send(VALID)).status

    assert asyncio.run(ask()) == CLOSED


def test_every_request_has_a_key_of_its_own() -> None:
    keys = iter([b"Key: 1\r\n", b"Key: 2\r\n", b"Key: 3\r\n"])
    endpoint = Endpoint(1, "tiny", lambda: next(keys))
    assert endpoint.encode(VALID).split(b"\r\n")[:3] == [
        b"POST /predictions/tiny HTTP/1.1",
        b"Host: 127.0.0.1",
        b"Key: 1",
    ]
    hostile = Call(b"body", start=b"BREW /pot HTCPCP/1.0\r\n{authorization}\r\n")
    assert endpoint.encode(hostile) == b"BREW /pot HTCPCP/1.0\r\nKey: 2\r\n\r\nbody"


def test_latency_is_counted_from_when_a_request_was_due() -> None:
    """A server that stalls once for 0.3 s delays all that were due meanwhile, and none may be left out."""
    stalled = []

    async def stall(_: bytes, writer: asyncio.StreamWriter) -> None:
        if not stalled:
            stalled.append(True)
            time.sleep(0.3)  # the whole loop, and so the generator too
        writer.write(reply())

    async def run() -> load.LoadResult:
        async with Server(stall) as server:
            return await load.open_load(server.endpoint, repeat(VALID), [0.01 * i for i in range(20)])

    result = asyncio.run(run())
    rows = result.table()
    assert rows["correct"].all()
    assert len(rows) == 20
    assert np.diff(np.sort(rows["due"])) == pytest.approx(0.01)
    assert np.median(rows["sent"] - rows["due"]) > 0.1
    assert result.latencies() == pytest.approx(rows["done"] - rows["due"])


def test_requests_come_whatever_became_of_the_ones_before() -> None:
    waiting: list[asyncio.StreamWriter] = []

    async def all_or_none(_: bytes, writer: asyncio.StreamWriter) -> None:
        waiting.append(writer)
        for one in waiting if len(waiting) == 30 else ():
            one.write(reply())

    async def run() -> load.LoadResult:
        async with Server(all_or_none) as server:
            return await load.open_load(server.endpoint, repeat(VALID), [0.0] * 30)

    result = asyncio.run(run())
    assert result.counts() == {"requests": 30, "refused": 0, "failed": 0}


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
    answers = [load.Answer(0, 0, done, 200, correct=True, valid=True) for done in (1, 1, 1, 2, 2, 2, 3, 3, 3)]
    assert load.LoadResult(answers).per_second(burst=3) == pytest.approx(3)
    assert load.LoadResult(answers[:1]).per_second() == 0
    assert load.LoadResult().counts() == {"requests": 0, "refused": 0, "failed": 0}


def test_percentiles() -> None:
    assert load.percentiles(np.arange(101) / 1000) == pytest.approx({"p50_ms": 50, "p90_ms": 90, "p99_ms": 99})
    assert load.percentiles(np.array([]), "refusal_")["refusal_p99_ms"] is None
