"""Strict readers of clients' JSON and base64."""

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from handlers.errors import MlvgmError

MAX_JSON_PARTS = 250_000
"""Largest number of objects, lists and texts in a body. Each takes far more memory than the two bytes of its text."""

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]{1,30}://", re.IGNORECASE)
_DATA_URL = re.compile(r"\s*data:[^,]{0,100};base64,", re.IGNORECASE)


class RequestError(MlvgmError, ValueError):
    """A request is malformed, or has a wrong option; the message is ASCII, and is sent to the client."""


_NAMES = {bool: "true or false", int: "a number", float: "a number", dict: "an object"}


def json_object(body: Any) -> dict[str, Any]:
    """The JSON object in a body, which the server may have parsed already, without entries that are null.

    Raises:
        RequestError: it is not an object, has a name twice, NaN or Infinity, or more than `MAX_JSON_PARTS` parts.
    """
    entries, fault = body, ""
    if isinstance(body, str | bytes | bytearray):
        text = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
        if text.count(b"[") + text.count(b"{") + text.count(b'"') // 2 > MAX_JSON_PARTS:
            raise RequestError(f"the JSON has more than {MAX_JSON_PARTS} lists, objects and texts")
        try:
            entries = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=without_repeats)
        except RequestError:
            raise
        except json.JSONDecodeError as error:
            entries, fault = None, f": no JSON from line {error.lineno}, column {error.colno}"
        except UnicodeDecodeError:
            entries, fault = None, ": it is not UTF-8"
        except (ValueError, RecursionError):
            entries, fault = None, ": a number is too long, or it is nested too deeply"
    if not isinstance(entries, dict):
        raise RequestError(f"the body is neither image bytes nor a JSON object with 'image' in base64{fault}")
    return given(entries)


def given(entries: Mapping[str, Any]) -> dict[str, Any]:
    """``entries`` without those that are null, which typed clients write for missing entries."""
    return {name: value for name, value in entries.items() if value is not None}


def base64_bytes(text: Any) -> bytes:
    """The bytes of an image in base64: of either alphabet, with or without line breaks and padding, or in a data URL.

    Raises:
        RequestError: it is not a text, or not base64.
    """
    if not isinstance(text, str):
        raise RequestError(f"an image in JSON must be a text in base64 under 'image', not {quoted(text)}")
    if _ADDRESS.match(text):
        raise RequestError(
            "image: this is an address, and images are not fetched from anywhere: send its bytes in base64"
        )
    start = _DATA_URL.match(text)
    try:
        letters = text[start.end() if start else 0 :].encode("ascii").translate(_URL_SAFE, b" \t\r\n\v\f").rstrip(b"=")
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("image: not valid base64") from None


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The entries of an object, as an ``object_pairs_hook`` of `json.loads`.

    Raises:
        RequestError: a name is there twice.
    """
    entries = dict(pairs)
    if len(entries) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise RequestError(f"the JSON has {quoted(counts.most_common(1)[0][0])} twice")
    return entries


def quoted(text: Any) -> str:
    """A client's text for an error message, shortened and in ASCII; of anything else, what JSON calls it."""
    if not isinstance(text, str):
        return "null" if text is None else _NAMES.get(type(text), f"a {type(text).__name__}")
    return ascii(text[: 40 if text.isascii() else 10])


def _refuse_constant(name: str) -> None:
    raise RequestError(f"the JSON holds {name}, which is no number")
