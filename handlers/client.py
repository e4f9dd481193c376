"""Clients for the server, synchronous and for asyncio, with httpx. Not part of an archive.

>>> client = Client("https://purifier.example:8443", api_key=key, ca_file="ca.pem")
>>> client.predict(Path("sign.png").read_bytes(), "road-signs", samples=8)["label"]
'stop'

Connections are kept open between calls. After a 429 or 503 with ``Retry-After``, a call is repeated at that time. On
TorchServe's machine, ``Client(key_file=...)`` reads its keys and renews expired ones.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import ipaddress
import json
import random
import ssl
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import quote

import httpx

from handlers import reply
from handlers.errors import InputError
from handlers.reply import ServerError

if TYPE_CHECKING:
    from typing import Unpack

MAX_PAUSE_S = 60
"""Seconds. If ``Retry-After`` is longer, a call is not repeated."""
_CONNECT_S = 10
_KEEP_S = 20  # nginx closes connections after 30 s without a request


class Options(TypedDict, total=False):
    """Options of a request; the server has defaults for those that are missing or None (docs/requests.md).

    Attributes:
        samples: purified samples that vote, 1 to the model's maximum, or "auto".
        top_k: number of classes in the answer.
        alphas: schedule of alphas, by name.
        seed: of the noise, if the server allows clients to choose it.
        certify: noisy images to draw for a certificate, within the server's budget.
    """

    samples: int | str | None
    certify: int | None
    top_k: int | None
    alphas: str | None
    seed: int | None


class _BaseClient:
    """The common part of both clients: building requests, retries, and errors."""

    _transport: type[httpx.Client] | type[httpx.AsyncClient]

    def __init__(
        self,
        url: str,
        timeout: float = 120,
        *,
        api_key: str | None = None,
        ca_file: str | Path | None = None,
        retries: int = 3,
    ) -> None:
        self._url = _parse(url)
        self._timeout, self._retries = timeout, retries
        self._http: Any = self._transport(
            base_url=self._url,
            headers={} if api_key is None else {"X-Api-Key": _header("api_key", api_key)},
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_S)),
            limits=httpx.Limits(keepalive_expiry=_KEEP_S),
            verify=_tls(self._url, ca_file),
            trust_env=not _is_loopback(self._url.host),  # no proxy for requests to this machine
        )

    def _prediction(self, data: bytes, model: str, options: Mapping[str, Any]) -> httpx.Request:
        headers = {"Content-Type": "application/json" if data.startswith(b"{") else "application/octet-stream"}
        for name, value in options.items():
            if name not in (*Options.__annotations__, "return"):
                raise TypeError(f"there is no option {name!r}: the options are {', '.join(Options.__annotations__)}")
            if value is not None:
                headers[f"X-Mlvgm-{name.replace('_', '-').title()}"] = _header(name, str(value))
        return self._http.build_request("POST", f"/predictions/{quote(model, safe='')}", content=data, headers=headers)

    def _pause(self, response: httpx.Response, attempt: int) -> float | None:
        """Seconds to wait before the request is repeated; None if it is not repeated."""
        if response.status_code not in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            return None
        seconds = _retry_after(response.headers.get("Retry-After", ""))
        if attempt >= self._retries or seconds is None or seconds > MAX_PAUSE_S:
            return None
        return seconds + random.uniform(0, 0.5)  # random, so that refused clients do not all return at once

    def _unreachable(self, error: httpx.HTTPError) -> ServerError:
        reason = str(error) or type(error).__name__
        if isinstance(error, httpx.ConnectTimeout):
            reason = "no connection in time"
        elif isinstance(error, httpx.TimeoutException):
            reason = f"no answer within {self._timeout:g} s"
        elif isinstance(error, httpx.ConnectError) and ("refused" in reason or "attempts failed" in reason):
            reason = "no server there"
        elif "CERTIFICATE_VERIFY_FAILED" in reason:
            reason += ": name the certificate of its authority with ca_file (--ca-file)"
        return ServerError(f"{self._url}: {reason}")


class Client(_BaseClient):
    """A synchronous, thread-safe client of one server. Use it as a context manager, or call `close`.

    Args:
        url: URL of nginx, or of TorchServe's inference port.
        management_url: URL of TorchServe's management port, for keys and workers; by default the port after ``url``'s.
        key_file: TorchServe's ``key_file.json``; None behind nginx, or if token authorization is off.
        timeout: seconds to wait for an answer.
        api_key: key for nginx, sent as ``X-Api-Key``.
        ca_file: PEM file of the certificate authorities to trust instead of the public ones.
        retries: how often a call is repeated at most after a 429 or 503 with ``Retry-After``.

    Raises:
        ServerError: ``url`` is not an http or https URL, or ``ca_file`` has no certificate.
        InputError: ``api_key`` cannot be a key.
    """

    _transport = httpx.Client

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        management_url: str | None = None,
        key_file: str | Path | None = None,
        timeout: float = 120,
        *,
        api_key: str | None = None,
        ca_file: str | Path | None = None,
        retries: int = 3,
    ) -> None:
        super().__init__(url, timeout, api_key=api_key, ca_file=ca_file, retries=retries)
        self._management = _parse(management_url) if management_url else None
        self._key_file = Path(key_file) if key_file else None
        self._renewing = threading.Lock()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the open connections."""
        self._http.close()

    def predict(self, image: bytes, model: str, **options: Unpack[Options]) -> dict[str, Any]:
        """The answer for one encoded image: label, confidence, agreement, flagged, unpurified, top_k, timing_ms.

        Raises:
            ServerError: the server is unreachable, or refused the request (status 400 and up); with its reason.
        """
        return reply.read(self._send(self._prediction(image, model, options)), reply.answer)

    def predict_many(self, images: Sequence[bytes], model: str, **options: Unpack[Options]) -> list[dict[str, Any]]:
        """The answers for several encoded images in one request, in their order; see `predict`.

        If only some images were refused, their entries have ``error`` and ``status`` instead.

        Raises:
            ServerError: as for `predict`, or no image could be answered.
        """
        return reply.read(self._send(self._prediction(_combine(images), model, options)), reply.answers)

    def purify(self, image: bytes, model: str, **options: Unpack[Options]) -> tuple[bytes, dict[str, Any]]:
        """The purified image as PNG, and the main results.

        Raises:
            ServerError: as for `predict`.
        """
        return reply.read(self._send(self._prediction(image, model, {**options, "return": "purified"})), reply.purified)

    def ready_workers(self, model: str) -> int:
        """How many workers of ``model`` can answer now.

        Raises:
            ServerError: unreachable, or there is no such model.
        """
        return reply.read(self._manage("GET", f"/models/{quote(model, safe='')}"), reply.ready_workers)

    def set_workers(self, model: str, count: int, wait: bool = True) -> None:
        """Scale ``model`` to ``count`` workers, and with ``wait`` until they are up.

        Raises:
            ServerError: unreachable, or not all of them came up.
        """
        number = f"min_worker={count}&max_worker={count}&synchronous={str(wait).lower()}"
        self._manage("PUT", f"/models/{quote(model, safe='')}?{number}")

    def key(self, kind: str) -> str:
        """The current key of ``kind`` "inference", "management" or "API" in the key file.

        Raises:
            ServerError: there is no readable key file.
        """
        if self._key_file is None:
            raise ServerError("this client was given no key file")
        try:
            return str(json.loads(self._key_file.read_text())[kind]["key"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self._key_file}: no {kind} key there ({error}): is the server running?") from None

    def renew_key(self, kind: str) -> None:
        """Have the server write a new key of ``kind`` "inference" or "management", which invalidates the old one.

        Raises:
            ServerError: unreachable, or the API key is not accepted.
        """
        self._send(self._renewal(kind), None)

    def _renewal(self, kind: str) -> httpx.Request:
        headers = {"Authorization": f"Bearer {self.key('API')}"}
        return self._http.build_request("GET", self._managed(f"/token?type={kind}"), headers=headers)

    def _manage(self, method: str, path: str) -> httpx.Response:
        return self._send(self._http.build_request(method, self._managed(path)), "management")

    def _managed(self, path: str) -> str:
        default = 443 if self._url.scheme == "https" else 80
        url = self._management or self._url.copy_with(port=(self._url.port or default) + 1)
        return str(url).rstrip("/") + path

    def _send(self, request: httpx.Request, kind: str | None = "inference") -> httpx.Response:
        """Send a request, with the key of ``kind`` if there is a key file."""
        auth = _Bearer(self, kind) if kind and self._key_file else None
        attempt = 0
        try:
            response = self._http.send(request, auth=auth)
            while (pause := self._pause(response, attempt)) is not None:
                time.sleep(pause)
                response, attempt = self._http.send(request, auth=auth), attempt + 1
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        return reply.check(response)


class AsyncClient(_BaseClient):
    """`Client` for asyncio, behind nginx: without TorchServe's keys and management.

    Its methods, arguments and errors are those of `Client`.
    """

    _transport = httpx.AsyncClient

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As `Client.close`."""
        await self._http.aclose()

    async def predict(self, image: bytes, model: str, **options: Unpack[Options]) -> dict[str, Any]:
        """As `Client.predict`."""
        return reply.read(await self._send(self._prediction(image, model, options)), reply.answer)

    async def predict_many(
        self, images: Sequence[bytes], model: str, **options: Unpack[Options]
    ) -> list[dict[str, Any]]:
        """As `Client.predict_many`."""
        return reply.read(await self._send(self._prediction(_combine(images), model, options)), reply.answers)

    async def purify(self, image: bytes, model: str, **options: Unpack[Options]) -> tuple[bytes, dict[str, Any]]:
        """As `Client.purify`."""
        return reply.read(
            await self._send(self._prediction(image, model, {**options, "return": "purified"})), reply.purified
        )

    async def _send(self, request: httpx.Request) -> httpx.Response:
        attempt = 0
        try:
            response = await self._http.send(request)
            while (pause := self._pause(response, attempt)) is not None:
                await asyncio.sleep(pause)
                response, attempt = await self._http.send(request), attempt + 1
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        return reply.check(response)


class _Bearer(httpx.Auth):
    """Sends TorchServe's key. If it is refused, renews it (unless another process has done so) and tries once more."""

    requires_response_body = True

    def __init__(self, client: Client, kind: str) -> None:
        self._client, self._kind = client, kind

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        key = self._client.key(self._kind)
        request.headers["Authorization"] = f"Bearer {key}"
        response = yield request
        if response.status_code not in (400, 401, 403) or b"InvalidKeyException" not in response.content:
            return
        with self._client._renewing:  # of the threads that are refused, one renews it: a renewal invalidates the former
            if self._client.key(self._kind) == key:
                reply.check((yield self._client._renewal(self._kind)))
            request.headers["Authorization"] = f"Bearer {self._client.key(self._kind)}"
        yield request


def _parse(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url if "//" in url else f"http://{url}")
    except httpx.InvalidURL as error:
        raise ServerError(f"{url}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ServerError(f"{url}: not the http:// or https:// address of a server")
    return parsed


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tls(url: httpx.URL, ca_file: str | Path | None) -> ssl.SSLContext | bool:
    if ca_file is None:
        # http needs no certificates, and to load those of all authorities takes time.
        return True if url.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except ssl.SSLError:
        raise ServerError(f"{ca_file}: holds no certificate in PEM") from None
    except OSError as error:
        raise ServerError(f"{ca_file}: cannot be read: {error.strerror}") from None


def _header(name: str, value: str) -> str:
    if not value or not value.isascii() or not value.isprintable():
        raise InputError(f"{name} must be printable ASCII")
    return value


def _retry_after(value: str) -> float | None:
    """Seconds from now until the time in a header (a number of seconds, or a date); None if it has neither."""
    if value.isascii() and value.isdigit() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _combine(images: Sequence[bytes]) -> bytes:
    return json.dumps({"images": [base64.b64encode(image).decode() for image in images]}).encode()
