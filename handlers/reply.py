"""What a server replied to a client: an answer, or the error that it is."""

import http.client
import json
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

from handlers.errors import MlvgmError

T = TypeVar("T")


class ServerError(MlvgmError):
    """The server cannot be reached, or answered with an error; ``status`` is the HTTP status, 0 if there is none."""

    def __init__(self, message: str, status: int = 0) -> None:
        self.status = status
        super().__init__(message)


def refusal(status: int, body: bytes) -> ServerError:
    """The error in the body of a response with an error status."""
    try:
        content = json.loads(body)
        each = (f"image {i}: {answer['error']}" for i, answer in enumerate(content.get("answers", ())))
        reason = content.get("error") or content.get("message") or "; ".join(each)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        reason = body.decode("utf-8", "replace")[:200]
    return ServerError(f"the server answered {status}: {reason or http.client.responses.get(status, '')}", status)


def check(response: httpx.Response) -> httpx.Response:
    """``response`` itself if its status is a success.

    Raises:
        ServerError: it is not.
    """
    if response.is_redirect:
        elsewhere = f"the server answered {response.status_code}: look at {response.headers.get('Location')}"
        raise ServerError(elsewhere, response.status_code)
    if not response.is_success:
        raise refusal(response.status_code, response.content)
    return response


def read(response: httpx.Response, parse: Callable[[httpx.Response], T]) -> T:
    """What ``parse``, one of the functions below, finds in a response.

    Raises:
        ServerError: the response is that of another server.
    """
    try:
        return parse(response)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise ServerError(f"{response.url}: an answer that is not of this server", response.status_code) from None


def answer(response: httpx.Response) -> dict[str, Any]:
    """The answer for one image."""
    return {**response.json()}


def answers(response: httpx.Response) -> list[dict[str, Any]]:
    """The answers for several images, in order."""
    return list(response.json()["answers"])


def purified(response: httpx.Response) -> tuple[bytes, dict[str, Any]]:
    """A purified image as PNG, and the main results."""
    return response.content, json.loads(response.headers["X-Mlvgm-Answer"])


def ready_workers(response: httpx.Response) -> int:
    """Number of workers that can answer, of TorchServe's description of a model."""
    return sum(worker["status"] == "READY" for worker in response.json()[0]["workers"])
