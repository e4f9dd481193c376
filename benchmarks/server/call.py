"""Requests to measure a server with, each with the answer that is right for it, and where they are sent."""

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

REFUSED = range(400, 500)


@dataclass(frozen=True, slots=True)
class Call:
    """One request.

    Attributes:
        body: as it is sent.
        headers: of its own, each line with its end.
        label: index of the right class; None where a status from 400 to 499 is right.
        kind: what is wrong with it, for the report.
        also_accept: a status that is right as well: TorchServe's own, before any code of ours has seen the request.
        start: for what is no plain request to the target: everything before the body, with {authorization} for the
            key's header; ``headers`` are not sent then.
    """

    body: bytes
    headers: bytes = b""
    label: int | None = None
    kind: str = "valid"
    also_accept: int = 0
    start: bytes | None = None

    def is_right(self, status: int, body: bytes) -> bool:
        """Whether this is an answer that the call should get."""
        if self.label is None:
            return status in REFUSED or status == self.also_accept
        try:
            return status == 200 and json.loads(body)["index"] == self.label
        except (ValueError, KeyError, TypeError):
            return False


class Target(Protocol):
    """Where calls go."""

    address: tuple[str, int]
    tls: ssl.SSLContext | None

    def request(self, call: Call) -> bytes:
        """``call`` as bytes of HTTP/1.1."""

    def refresh_key(self, request: bytes, body: bytes) -> bool:
        """Whether ``body`` refuses only the key of ``request``, and there is a new key now."""


def image_call(image: bytes, label: int, options: Mapping[str, object]) -> Call:
    """An encoded image as the body, its options as headers."""
    names = "".join(f"X-Mlvgm-{name}: {value}\r\n" for name, value in options.items())
    return Call(image, f"Content-Type: application/octet-stream\r\n{names}".encode(), label)


def prediction(call: Call, model: str, authorization: bytes) -> bytes:
    """``call`` as TorchServe and nginx take it for ``model``, with the header line that authorizes it."""
    if call.start is not None:
        return call.start.replace(b"{authorization}", authorization) + call.body
    line = f"POST /predictions/{model} HTTP/1.1"
    return head(line, "127.0.0.1", authorization, call.headers, len(call.body)) + call.body


def head(line: str, host: str, authorization: bytes, headers: bytes, length: int) -> bytes:
    """Everything before the body of a request."""
    return b"%s\r\nHost: %s\r\n%s%sContent-Length: %d\r\n\r\n" % (
        line.encode(),
        host.encode(),
        authorization,
        headers,
        length,
    )
