"""A client for the server, with the standard library alone. It reads TorchServe's key file and renews what has expired.

>>> client = Client(key_file="build/serve/8080/key_file.json")
>>> client.predict(Path("sign.png").read_bytes(), "road-signs", samples=8)["label"]
'stop'
"""

import base64
import http.client
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from handlers.errors import MlvgmError


class ServerError(MlvgmError):
    """The server cannot be reached, or answered with an error; ``status`` is its HTTP status, 0 when it gave none."""

    def __init__(self, message: str, status: int = 0) -> None:
        self.status = status
        super().__init__(message)


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; header names are lower-case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Predictor:
    """What can be asked of a server, whichever way it is reached."""

    def predict(
        self,
        image: bytes,
        model: str,
        samples: int | None = None,
        top_k: int | None = None,
        alphas: str | None = None,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """The answer for one encoded image: label, confidence, agreement, flagged, unpurified, top_k, timing_ms.

        Raises:
            ServerError: unreachable, or the request was refused (status 400 and up) with the server's reason.
        """
        options = {"samples": samples, "top_k": top_k, "alphas": alphas, "seed": seed}
        answer: dict[str, Any] = json.loads(self._ask(image, model, options))
        return answer

    def predict_many(
        self,
        images: Sequence[bytes],
        model: str,
        samples: int | None = None,
        top_k: int | None = None,
        alphas: str | None = None,
        seed: int | None = None,
    ) -> list[dict[str, Any]]:
        """The answers for several encoded images in one request, in their order; see `predict`.

        The entry of an image that was refused while others were answered holds ``error`` and ``status`` instead.

        Raises:
            ServerError: as for `predict`, and when no image at all could be answered.
        """
        options = {"samples": samples, "top_k": top_k, "alphas": alphas, "seed": seed}
        body = json.dumps({"images": [base64.b64encode(image).decode() for image in images]}).encode()
        answers: list[dict[str, Any]] = json.loads(self._ask(body, model, options))["answers"]
        return answers

    def _ask(self, data: bytes, model: str, options: dict[str, Any]) -> bytes:
        """The body of the answer to an encoded image or a JSON object, with those options that are not None."""
        raise NotImplementedError


class Client(Predictor):
    """Talks to one TorchServe over HTTP.

    Args:
        url: of the inference port.
        management_url: of the management port, for keys and workers; None takes the port after that of ``url``.
        key_file: TorchServe's ``key_file.json``; None when token authorization is off.
        timeout: seconds to wait for an answer.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        management_url: str | None = None,
        key_file: str | Path | None = None,
        timeout: float = 120,
    ) -> None:
        self._inference = _address(url)
        host, port = self._inference
        self._management = _address(management_url) if management_url else (host, port + 1)
        self._key_file = Path(key_file) if key_file else None
        self._timeout = timeout

    def purify(
        self,
        image: bytes,
        model: str,
        samples: int | None = None,
        alphas: str | None = None,
        seed: int | None = None,
    ) -> tuple[bytes, dict[str, Any]]:
        """The purified image as PNG, and the main figures of the answer.

        Raises:
            ServerError: as for `predict`.
        """
        options = {"samples": samples, "alphas": alphas, "seed": seed, "return": "purified"}
        reply = self._reply(image, model, options)
        return reply.body, json.loads(reply.headers["x-mlvgm-answer"])

    def ready_workers(self, model: str) -> int:
        """How many workers of ``model`` can answer now.

        Raises:
            ServerError: unreachable, or there is no such model.
        """
        description = json.loads(self._manage("GET", f"/models/{quote(model)}").body)
        return sum(worker["status"] == "READY" for worker in description[0]["workers"])

    def set_workers(self, model: str, count: int) -> None:
        """Scale ``model`` to ``count`` workers and wait until they are up.

        Raises:
            ServerError: unreachable, or not all of them came up.
        """
        self._manage("PUT", f"/models/{quote(model)}?min_worker={count}&max_worker={count}&synchronous=true")

    def key(self, kind: str) -> str:
        """The key of ``kind`` "inference", "management" or "API" as the key file has it now.

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
        """Have the server write a fresh key of ``kind`` "inference" or "management"; the old one dies at once.

        Raises:
            ServerError: unreachable, or the API key is not accepted.
        """
        reply = _send(self._management, "GET", f"/token?type={kind}", b"", _bearer(self.key("API")), self._timeout)
        _check(reply)

    def _ask(self, data: bytes, model: str, options: dict[str, Any]) -> bytes:
        return self._reply(data, model, options).body

    def _reply(self, data: bytes, model: str, options: dict[str, Any]) -> Reply:
        is_json = data.startswith(b"{")
        headers = {"Content-Type": "application/json" if is_json else "application/octet-stream"}
        for name, value in options.items():
            if value is not None:
                headers[f"X-Mlvgm-{name.replace('_', '-').title()}"] = str(value)
        return self._authorized(self._inference, "POST", f"/predictions/{quote(model)}", data, headers, "inference")

    def _manage(self, method: str, path: str) -> Reply:
        return self._authorized(self._management, method, path, b"", {}, "management")

    def _authorized(
        self, address: tuple[str, int], method: str, path: str, body: bytes, headers: dict[str, str], kind: str
    ) -> Reply:
        """Send with the key; if it is refused, once more with a newer one: what another client renewed, or our own."""
        if self._key_file is None:
            return _check(_send(address, method, path, body, headers, self._timeout))
        key = self.key(kind)
        reply = _send(address, method, path, body, headers | _bearer(key), self._timeout)
        if _key_refused(reply):
            if self.key(kind) == key:
                self.renew_key(kind)
            reply = _send(address, method, path, body, headers | _bearer(self.key(kind)), self._timeout)
        return _check(reply)


def _send(
    address: tuple[str, int], method: str, path: str, body: bytes, headers: dict[str, str], timeout: float
) -> Reply:
    connection = http.client.HTTPConnection(*address, timeout=timeout)  # unlike urllib, never through a proxy
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    except (OSError, http.client.HTTPException) as error:
        reason = "no server there" if isinstance(error, ConnectionRefusedError) else str(error) or type(error).__name__
        raise ServerError(f"http://{address[0]}:{address[1]}: {reason}") from None
    finally:
        connection.close()


def refusal(status: int, body: bytes) -> ServerError:
    """What the server says in the body of an answer with an error status."""
    try:
        content = json.loads(body)
        reason = content.get("error") or content.get("message") or _reasons(content["answers"])
    except (ValueError, AttributeError, KeyError, TypeError):
        reason = body.decode("utf-8", "replace")[:200] or http.client.responses.get(status, "")
    return ServerError(f"the server answered {status}: {reason}", status)


def _check(reply: Reply) -> Reply:
    if reply.status >= 400:
        raise refusal(reply.status, reply.body)
    return reply


def _reasons(answers: Sequence[dict[str, Any]]) -> str:
    """Why each of several images could not be answered."""
    return "; ".join(f"image {i}: {answer['error']}" for i, answer in enumerate(answers))


def _key_refused(reply: Reply) -> bool:
    return reply.status in (400, 401, 403) and b"InvalidKeyException" in reply.body


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise ServerError(f"{url}: not the http:// address of a server")
    return parts.hostname, parts.port or 80
