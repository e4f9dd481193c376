"""HTTP/1.1 on one kept connection, as cheaply as Python can: the generator shares its cores with what it measures."""

import asyncio
import ssl
from typing import NamedTuple

CLOSED, SILENT = 0, -1
"""In place of a status: the connection ended without an answer; none came in time."""


class RawReply(NamedTuple):
    """A status, or `CLOSED` or `SILENT`, and the body."""

    status: int
    body: bytes


class Connection:
    """Sends one request at a time, and connects when it must.

    Args:
        address: host and port.
        timeout: seconds to wait for a connection, and for an answer.
        tls: None for a plain connection.
    """

    def __init__(self, address: tuple[str, int], timeout: float, tls: ssl.SSLContext | None = None) -> None:
        self._address, self._timeout, self._tls = address, timeout, tls
        self._wire: _Wire | None = None

    async def ask(self, request: bytes) -> RawReply:
        """Send ``request`` and wait for the answer. Never raises: what goes wrong is a status."""
        loop = asyncio.get_running_loop()
        wire = self._wire
        if wire is None or not wire.open:
            try:
                connecting = loop.create_connection(_Wire, *self._address, ssl=self._tls)
                wire = (await asyncio.wait_for(connecting, self._timeout))[1]
            except (TimeoutError, asyncio.TimeoutError):
                return RawReply(SILENT, b"")
            except OSError:
                return RawReply(CLOSED, b"")
        self._wire = wire
        return await wire.ask(request, self._timeout)

    def close(self) -> None:
        """Give the connection up; another request would make a new one."""
        if self._wire is not None:
            self._wire.close()


class _Wire(asyncio.Protocol):
    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[RawReply] | None = None
        self._received = bytearray()

    async def ask(self, request: bytes, timeout: float) -> RawReply:
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self._received.clear()
        self._waiting = loop.create_future()
        alarm = loop.call_later(timeout, self._finish, RawReply(SILENT, b""), False)
        self._transport.write(request)
        try:
            return await self._waiting
        finally:
            alarm.cancel()

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.open = transport, True

    def connection_lost(self, _: Exception | None) -> None:
        self._finish(RawReply(CLOSED, b""), False)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._received[:end]).lower()
        length = _length(head)
        if length is None:  # chunks, say: no server that is measured here sends them
            self._finish(RawReply(CLOSED, b""), False)
        elif len(self._received) >= end + 4 + length:
            body = bytes(self._received[end + 4 : end + 4 + length])
            self._finish(RawReply(int(head[9:12]), body), b"connection: close" not in head)

    def _finish(self, reply: RawReply, keep: bool) -> None:
        if not keep:
            self.close()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(reply)


def _length(head: bytes) -> int | None:
    """What the headers, in lower case, say of the body."""
    place = head.find(b"\r\ncontent-length:")
    if place < 0:
        return None
    value = head[place + 17 :].split(b"\r\n", 1)[0].strip()
    return int(value) if value.isdigit() else None
