"""Parse a prediction request: raw bytes, a multipart form, JSON, or the Open Inference Protocol.

Options are ``samples``, ``top_k``, ``return`` ("json" or "purified"), ``alphas``, ``seed`` and ``certify``. A form has
them as fields, JSON as entries beside "image" (base64), and any request as headers: X-Mlvgm-Samples and so on.
JSON may hold several images: a list under "images". So may a form that comes through nginx: several fields "image".
"""

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from handlers import form
from handlers.image import format_of
from handlers.manifest import AUTO, Manifest
from handlers.noise import SEED_BITS
from handlers.open_inference import JSON_LENGTH_HEADER, Envelope, Image, read
from handlers.strict_json import RequestError, base64_bytes, json_object, quoted

__all__ = ["MAX_BODY", "MOST_IMAGES", "OPTIONS", "Request", "RequestError", "parse"]

OPTIONS = ("samples", "top_k", "return", "alphas", "seed", "certify")
MOST_IMAGES = 16
"""Largest number of images in a request. All of them may have four times the maximum of samples of one image."""
MAX_BODY = 6_553_500
"""Largest body in bytes, compressed or not: of nginx (deploy/upstream.conf), and as deploy/config.properties has it."""

Layout = Literal["one", "list"] | Envelope
_Content = tuple[tuple[Image, ...], dict[str, Any], Layout]
"""Content of a body: images, options, and layout of the answers."""

_IMAGE_FIELDS = ("image", "data", "body")
_HEADER_PREFIX = "x-mlvgm-"
_CLIENT_HEADER = "x-sharing-client"
_MARK = b"\xef\xbb\xbf"  # of UTF-8
_JSON_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{")
_NEVER = re.compile(r"\s*q\s*=\s*0(\.0*)?\s*")
_DEFAULT_TOP_K = 5
_MOST_TOP_K = 1000  # a response larger than TorchServe's max_response_size kills the worker


@dataclass(frozen=True)
class Request:
    """A request with all options.

    Attributes:
        images: encoded, or uint8 (H, W, 3).
        samples: purified samples to draw, or "auto" for as many as the vote needs.
        top_k: number of classes in the answer.
        wants_image: answer with the purified image instead of JSON.
        alphas: name of a schedule of the bundle.
        seed: seed of the first image, which is incremented for each further image; None for fresh seeds.
        certify: counted noisy images per image, for a certificate; 0 for none.
        layout: of the answers: "one", a "list", or tensors in the `Envelope` of the Open Inference Protocol.
        client: who asks, where the proxy says that several clients share the workers.
    """

    images: tuple[Image, ...]
    samples: int | str
    top_k: int
    wants_image: bool
    alphas: str
    seed: int | None
    certify: int = 0
    layout: Layout = "one"
    client: str = ""


def parse(
    fields: Mapping[str, Any],
    headers: Mapping[str, Any],
    manifest: Manifest,
    allow_seed: bool = False,
    most_draws: int = 0,
) -> Request:
    """Read one request.

    Args:
        fields: fields of a form by name, or the whole body as "body" or "data": bytes, or parsed JSON.
        headers: HTTP headers, in any case.
        allow_seed: whether clients may choose the seed.
        most_draws: largest number of draws for certificates of all images together.

    Raises:
        RequestError: there is no image, or an option is unknown or out of range; the message names the range.
    """
    named = _header_options(headers)
    headers = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
    fields = _unpacked(fields, headers)
    body = fields.get("body")
    if form.HEADER in headers and isinstance(body, bytes | bytearray):
        images, given, layout = _form(form.read(body, headers[form.HEADER]), headers)
    else:
        images, given, layout = _content(fields, headers)
    options = named | given
    if unknown := [name for name in options if name not in OPTIONS]:
        raise RequestError(f"unknown option {quoted(unknown[0])}: the options are {', '.join(OPTIONS)}")
    if "seed" in options and not allow_seed:
        raise RequestError("seed: this server does not let clients choose the noise")
    most_named = min(len(manifest.classes), _MOST_TOP_K)
    request = Request(
        images=images,
        samples=_samples(options, manifest),
        top_k=_integer(options, "top_k", 1, most_named, min(_DEFAULT_TOP_K, most_named)),
        wants_image=_choice(options, "return", ("json", "purified"), _accepted(headers)) == "purified",
        alphas=_choice(options, "alphas", manifest.alphas, manifest.default_alphas),
        seed=_integer(options, "seed", 0, 2**SEED_BITS - len(images), 0) if "seed" in options else None,
        certify=_certify(options, most_draws, len(images)),
        layout=layout,
        client=headers.get(_CLIENT_HEADER, ""),
    )
    if layout != "one" and request.wants_image:
        raise RequestError("return: a purified image comes for one image a request, as 'image'")
    if isinstance(layout, Envelope) and request.certify:
        raise RequestError("certify: tensors have no place for a certificate; send the image as it is, or in JSON")
    if request.samples != AUTO and len(images) * int(request.samples) > 4 * manifest.samples.max:
        raise RequestError(f"images times samples may be {4 * manifest.samples.max} at most")
    return request


def _form(fields: list[tuple[str, bytes]], headers: Mapping[str, str]) -> _Content:
    """Content of a form: one image, with the layout of a request that TorchServe has parsed, or several."""
    by_name = dict(fields)
    if len(by_name) == len(fields):
        return _content(by_name, headers)
    images = tuple(_plain(content) for name, content in fields if name in _IMAGE_FIELDS)
    options = {name: content for name, content in by_name.items() if name not in _IMAGE_FIELDS}
    if len(by_name) != len(options) + 1 or len(fields) != len(options) + len(images):
        raise RequestError("a form can have several fields 'image', and any other once")
    if len(images) > MOST_IMAGES:
        raise RequestError(f"a form can have {MOST_IMAGES} images at most")
    return images, options, "list"


def _content(fields: Mapping[str, Any], headers: Mapping[str, str]) -> _Content:
    """Content of a body that is not a form."""
    content_type = headers.get("content-type", "").lower()
    named = [name for name in _IMAGE_FIELDS if name in fields]
    if not named and "urlencoded" in content_type:  # which curl sends with any body
        raise RequestError("the content type is that of a web form: send one like image/png, or use curl -T FILE")
    if len(named) != 1:
        raise RequestError("send one image: as the body, as the form field 'image', or as 'image' in JSON")
    body = fields[named[0]]
    options = {name: value for name, value in fields.items() if name != named[0]}
    if isinstance(body, bytes | bytearray):
        if format_of(body):
            return (bytes(body),), options, "one"
        if (image := _from_base64(body)) is not None:
            return (image,), options, "one"
        if JSON_LENGTH_HEADER in headers:
            return _behind_json(bytes(body), headers, options)
        if not ("json" in content_type or _JSON_START.match(body)):
            return (bytes(body),), options, "one"
    return _json(json_object(body), b"", options)


def _json(entries: dict[str, Any], binary: bytes, options: dict[str, Any]) -> _Content:
    """What JSON says, and the data of tensors ``binary`` behind it."""
    given = [name for name in ("image", "images", "inputs") if name in entries]
    if len(given) > 1:
        raise RequestError(f"the JSON has {given[0]!r} and {given[1]!r}: send one of them")
    if given == ["inputs"]:
        images, parameters, envelope = read(entries, binary, MOST_IMAGES)
        return tuple(map(_plain, images)), options | parameters, envelope
    if binary:
        raise RequestError("bytes follow the JSON, but it has no tensor in 'inputs' to hold them")
    if not given:
        instead = f", but {quoted(next(iter(entries)))}" if entries else ""
        raise RequestError(f"the JSON has no 'image' in base64, no 'images' and no 'inputs'{instead}")
    if given == ["image"]:
        return (base64_bytes(entries.pop("image")),), options | entries, "one"
    texts = entries.pop("images")
    if not isinstance(texts, list) or not 1 <= len(texts) <= MOST_IMAGES:
        raise RequestError(f"images must be a list of 1 to {MOST_IMAGES} images in base64")
    return tuple(map(base64_bytes, texts)), options | entries, "list"


def _behind_json(body: bytes, headers: Mapping[str, str], options: dict[str, Any]) -> _Content:
    """JSON, as long as a header says, and tensors behind it."""
    length = _integer(headers, JSON_LENGTH_HEADER, 1, len(body), 0)
    try:
        entries = json_object(body[:length])
    except RequestError as error:
        raise RequestError(
            f"{JSON_LENGTH_HEADER} says {length}, and of the body's first {length} bytes: {error}"
        ) from None
    return _json(entries, body[length:], options)


def _unpacked(fields: Mapping[str, Any], headers: Mapping[str, str]) -> Mapping[str, Any]:
    """``fields`` with a gzip-compressed body decompressed, up to `MAX_BODY`."""
    coding, body = headers.get("content-encoding", "identity").strip().lower(), fields.get("body")
    if coding in ("", "identity") or not isinstance(body, bytes | bytearray):
        return fields
    if coding not in ("gzip", "x-gzip"):
        raise RequestError(f"Content-Encoding {quoted(coding)} is not understood: send the body as it is, or in gzip")
    reader = zlib.decompressobj(wbits=31)
    try:
        plain = reader.decompress(body, MAX_BODY)
    except zlib.error:
        raise RequestError("the body is not gzip, though Content-Encoding says so") from None
    if reader.unused_data:
        raise RequestError("the gzip of the body is followed by something: send it in one stream")
    if not reader.eof:
        raise RequestError(f"the gzip of the body is broken off, or holds more than {MAX_BODY} bytes")
    return {**fields, "body": plain}


def _from_base64(body: bytes | bytearray) -> bytes | None:
    """The image in a body that is base64 or a data URL, with or without quotes; None for any other body."""
    start = b"".join(body[:64].removeprefix(_MARK).split()).removeprefix(b'"')[:24].decode("latin-1")
    try:
        is_base64 = start.lower().startswith("data:") or format_of(base64_bytes(start))
    except RequestError:
        return None
    return base64_bytes(body.removeprefix(_MARK).decode("latin-1").strip().strip('"')) if is_base64 else None


def _plain(image: Image) -> Image:
    """``image``, also where it is in base64 among several, or behind JSON."""
    return (_from_base64(image) or image) if isinstance(image, bytes) else image


def _header_options(headers: Mapping[str, Any]) -> dict[str, Any]:
    """X-Mlvgm-Top-K: 3 is the option top_k."""
    options: dict[str, Any] = {}
    for name, value in headers.items():
        if name.lower().startswith(_HEADER_PREFIX) and isinstance(value, str):
            option = name.lower().removeprefix(_HEADER_PREFIX).replace("-", "_")
            if options.setdefault(option, value) != value:
                raise RequestError(f"{quoted(option)} is in two headers, which contradict")
    return options


def _accepted(headers: Mapping[str, str]) -> str:
    """Clients that accept PNG but not JSON get the image; browsers accept everything."""
    ranges = [part.partition(";") for part in headers.get("accept", "").lower().split(",")]
    taken = {kind.strip() for kind, _, quality in ranges if not _NEVER.fullmatch(quality)}
    takes_json = taken & {"application/json", "application/*", "*/*"}
    return "purified" if taken & {"image/png", "image/*"} and not takes_json else "json"


def _certify(options: Mapping[str, Any], most_draws: int, n_images: int) -> int:
    if "certify" not in options:
        return 0
    if most_draws < n_images:
        raise RequestError("certify: this server certifies no answers, or none to so many images at once")
    return _integer(options, "certify", 1, most_draws // n_images, 0)


def _samples(options: Mapping[str, Any], manifest: Manifest) -> int | str:
    wanted = _text(options.get("samples", manifest.samples.default))
    if wanted == AUTO:
        return AUTO
    return _integer({"samples": wanted}, "samples", 1, manifest.samples.max, 1, f", or {AUTO!r}")


def _integer(options: Mapping[str, Any], name: str, low: int, high: int, default: int, other: str = "") -> int:
    """A whole number: JSON's, or its decimal digits."""
    value = _text(options.get(name, default))
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}{other}")
    return value


def _choice(options: Mapping[str, Any], name: str, choices: Iterable[str], default: str) -> str:
    value = _text(options.get(name, default))
    if not isinstance(value, str) or value not in choices:
        raise RequestError(f"{name} must be one of {', '.join(quoted(choice) for choice in choices)}")
    return value


def _text(value: Any) -> Any:
    """Form fields come as bytes."""
    return bytes(value).decode("utf-8", "replace") if isinstance(value, bytes | bytearray) else value
