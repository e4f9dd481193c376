"""What clients wrote, read strictly: JSON and base64."""

import base64
import binascii
import json
from typing import Any

from handlers.errors import MlvgmError

MAX_JSON_PARTS = 250_000
"""Objects and lists in one body. Each costs memory many times the two bytes it takes to write one."""


class RequestError(MlvgmError, ValueError):
    """A request that cannot be answered as it stands; the message is ASCII and fit for the client."""


def json_object(body: Any) -> dict[str, Any]:
    """A body that must be a JSON object; TorchServe's settings may have it parsed already.

    Raises:
        RequestError: it is none, says a name twice, holds NaN or Infinity, or has more than `MAX_JSON_PARTS` parts.
    """
    entries = body
    if isinstance(body, str | bytes | bytearray):
        text = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
        if text.count(b"[") + text.count(b"{") > MAX_JSON_PARTS:
            raise RequestError(f"the JSON has more than {MAX_JSON_PARTS} lists and objects")
        try:
            entries = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
        except RequestError:
            raise
        except (ValueError, RecursionError):
            entries = None
    if not isinstance(entries, dict):
        raise RequestError("the body is neither image bytes nor a JSON object with 'image' in base64")
    return dict(entries)


def base64_bytes(text: Any) -> bytes:
    """The bytes of an image in base64, which may be wrapped.

    Raises:
        RequestError: not a text, or not base64.
    """
    if not isinstance(text, str):
        raise RequestError("JSON must hold the image in base64 under 'image'")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("image: not valid base64") from None


def quoted(text: Any) -> str:
    """A client's own word, fit for an answer: short and ASCII."""
    if not isinstance(text, str):
        return f"a {type(text).__name__}"
    return ascii(text[: 40 if text.isascii() else 10])


def _refuse_constant(name: str) -> None:
    raise RequestError(f"the JSON holds {name}, which is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise RequestError(f"the JSON has {quoted(next(name for name in names if names.count(name) > 1))} twice")
    return entries
