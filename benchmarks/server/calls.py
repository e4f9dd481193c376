"""Requests to measure a server with, each with its correct answer, and the connections that carry them.

Bytes are sent as they are, since no HTTP library would send what a hostile client does; and with little work, since the
load generator shares its cores with the server.
"""

import asyncio
import json
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

CLOSED, SILENT = 0, -1
"""In place of a status: the connection ended without an answer; no answer came in time."""

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n")


@dataclass(frozen=True, slots=True)
class Call:
    """One request.

    Attributes:
        body: as it is sent.
        headers: of its own, each line with its end.
        label: index of the correct class; None for a hostile request, which must be refused with 400 to 499.
        kind: what is wrong with it, for the report.
        also_accept: a status that is correct as well: TorchServe's own, before any code of ours has seen the request.
        start: for what is no plain request to the model: everything before the body, with {authorization} where the
            header with the key belongs; ``headers`` are not sent then.
    """

    body: bytes
    headers: bytes = b""
    label: int | None = None
    kind: str = "valid"
    also_accept: int = 0
    start: bytes | None = None

    def is_correct(self, status: int, body: bytes) -> bool:
        """Whether the request should be answered so."""
        if self.label is None:
            return 400 <= status < 500 or status == self.also_accept
        try:
            return status == 200 and json.loads(body)["index"] == self.label
        except (ValueError, KeyError, TypeError):
            return False


@dataclass(frozen=True)
class Endpoint:
    """A server on loopback to send calls to.

    Attributes:
        model: what the server calls the bundle.
        authorization: gives the header line with the key of a request.
        tls: None for a plain connection.
    """

    port: int
    model: str
    authorization: Callable[[], bytes] = bytes
    tls: ssl.SSLContext | None = None

    def encode(self, call: Call) -> bytes:
        """``call`` as bytes of HTTP/1.1."""
        key = self.authorization()
        if call.start is not None:
            return call.start.replace(b"{authorization}", key) + call.body
        return head(f"/predictions/{self.model}", key + call.headers, len(call.body)) + call.body


def head(path: str, headers: bytes, length: int) -> bytes:
    """Everything before the body of a POST request; each line of ``headers`` with its end."""
    line = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode()
    return line + headers + f"Content-Length: {length}\r\n\r\n".encode()


class RawReply(NamedTuple):
    """A status, or `CLOSED` or `SILENT`, and the body."""

    status: int
    body: bytes


class Connection:
    """A kept connection for one request at a time, opened again where the server has closed it.

    Args:
        timeout: seconds to wait for an answer.
    """

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self._endpoint, self._timeout = endpoint, timeout
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, call: Call) -> RawReply:
        """The answer to ``call``. Never raises: what goes wrong becomes the status."""
        try:
            return await asyncio.wait_for(self._exchange(self._endpoint.encode(call)), self._timeout)
        except (TimeoutError, asyncio.TimeoutError):  # the same from Python 3.11 on
            reply = RawReply(SILENT, b"")
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
            reply = RawReply(CLOSED, b"")
        self.close()
        return reply

    def close(self) -> None:
        """Give the connection up; another call opens a new one."""
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = None

    async def _exchange(self, request: bytes) -> RawReply:
        if self._streams is None or self._streams[0].at_eof() or self._streams[1].is_closing():
            self.close()
            endpoint = self._endpoint
            self._streams = await asyncio.open_connection("127.0.0.1", endpoint.port, ssl=endpoint.tls)
        reader, writer = self._streams
        writer.write(request)
        start = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = _LENGTH.search(start)
        if length is None:
            raise ValueError("an answer in chunks, say, which no server that is measured here sends")
        body = await reader.readexactly(int(length[1]))
        if b"\r\nconnection: close\r\n" in start:
            self.close()
        return RawReply(int(start[9:12]), body)
