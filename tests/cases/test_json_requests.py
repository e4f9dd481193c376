"""JSON and tensors as clients write them: the image is read, or the error names what was sent."""

import base64
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handlers.image import ImageError, decode
from handlers.manifest import Manifest
from handlers.request import RequestError, parse

JSON = {"Content-Type": "application/json"}
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def png() -> bytes:
    """So many bytes that their base64 needs padding; what follows the end of a PNG is not read."""
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    data = stream.getvalue()
    return data + bytes((1 - len(data)) % 3)


PNG = png()
TEXT = base64.b64encode(PNG).decode()
PLAIN = {"image": TEXT}
BODY = json.dumps(PLAIN).encode()
MARK = b"\xef\xbb\xbf"


def ask(manifest: Manifest, body: Any, headers: dict[str, str] = JSON, field: str = "body") -> Any:
    """The pixels that a body is read as, or the words of its refusal."""
    raw = json.dumps(body).encode() if isinstance(body, dict) else body
    try:
        return decode(parse({field: raw}, headers, manifest).images[0], manifest.image_size)
    except (RequestError, ImageError) as error:
        return str(error)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "BYTES", "shape": [1], "data": [TEXT]} | changes


@pytest.fixture(scope="session")
def manifest(nvae_bundle: Path) -> Manifest:
    return Manifest.read(nvae_bundle)


READ: dict[str, tuple[Any, ...]] = {
    "image in JSON": (PLAIN,),
    "tensors": ({"id": "7", "inputs": [tensor()]},),
    "id and outputs null": ({"id": None, "inputs": [tensor()], "outputs": None},),
    "parameters null": ({"inputs": [tensor()], "parameters": None},),
    "a tensor's parameters null": ({"inputs": [tensor(parameters=None)]},),
    "every entry of a typed model null": (
        {"inputs": [tensor()], "model_name": None, "model_version": None, "raw_input_contents": None},
    ),
    "an option null": (PLAIN | {"samples": None, "alphas": None},),
    "images null beside image": (PLAIN | {"images": None},),
    "an option of tensors null": ({"inputs": [tensor()], "parameters": {"samples": None}},),
    "model_name, as the KServe SDK writes it": ({"id": "7", "model_name": "road-signs", "inputs": [tensor()]},),
    "hints of Triton": ({"inputs": [tensor()], "parameters": {"priority": 1, "timeout": 5, "sequence_id": 0}},),
    "content_type, as MLServer writes it": ({"inputs": [tensor(parameters={"content_type": "base64"})]},),
    "byte order mark, JSON's content type": (MARK + BODY,),
    "byte order mark, no content type": (MARK + BODY, {}),
    "byte order mark and blank": (MARK + b"\n" + BODY, {}),
    "blank line in front, JSON's content type": (b"\r\n " + BODY,),
    "blank line in front, no content type": (b"\r\n " + BODY, {}),
    "UTF-16": (json.dumps(PLAIN).encode("utf-16"),),
    "gzip": (gzip.compress(BODY), JSON | {"Content-Encoding": "gzip"}),
    "an image in gzip": (gzip.compress(PNG), {"content-encoding": "x-gzip"}),
    "wrapped at 76 columns": ({"image": base64.encodebytes(PNG).decode()},),
    "data URL": ({"image": f"data:image/png;base64,{TEXT}"},),
    "without padding": ({"image": TEXT.rstrip("=")},),
    "the alphabet for URLs": ({"image": base64.urlsafe_b64encode(PNG).decode()},),
    "base64 as the body": (TEXT.encode(), {"Content-Type": "text/plain"}),
    "base64 as the body, wrapped": (b"\n" + base64.encodebytes(PNG), {}),
    "base64 as a form's field": (TEXT.encode(), {}, "image"),
    "data URL as a form's field": (f"data:image/png;base64,{TEXT}".encode(), {}, "image"),
    "base64 behind a byte order mark": (MARK + TEXT.encode(), {}),
    "base64 in quotes, as a JSON text": (json.dumps(TEXT).encode(),),
    "base64 in quotes and blanks": (f' "{TEXT}"\n'.encode(), {"Content-Type": "text/plain"}),
    "data URL in quotes": (f'"data:image/png;base64,{TEXT}"'.encode(),),
    "data URL in capitals": (f"DATA:IMAGE/PNG;BASE64,{TEXT}".encode(), {}),
    "gzip and a byte order mark": (gzip.compress(MARK + BODY), JSON | {"Content-Encoding": "GZIP"}),
    "an image and a stale length of JSON": (PNG, {"Inference-Header-Content-Length": "40"}),
    "an image in JSON and its right length": (BODY, {"Inference-Header-Content-Length": str(len(BODY))}),
    "image as text/plain": (PNG, {"Content-Type": "text/plain"}),
    "JSON as image/png": (BODY, {"Content-Type": "image/png"}),
    "image as application/json": (PNG, JSON),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_clear_is_read(name: str, manifest: Manifest) -> None:
    assert np.array_equal(ask(manifest, *READ[name]), PIXELS)


REFUSED: dict[str, tuple[str, Any, dict[str, str]]] = {
    "no JSON at all": ("json", b"nothing of the kind", JSON),
    "a name twice": ("'samples' twice", b'{"image": "aa", "samples": 1, "samples": 2}', JSON),
    "an entry that nobody knows": ("'input'", {"inputs": [tensor()], "input": []}, JSON),
    "letters that are no base64": ("base64", {"image": "*" * 8}, JSON),
    "a data URL without base64": ("base64", {"image": "data:image/png,%89PNG"}, JSON),
    "an address": ("not fetched", {"image": "https://example.com/sign.png"}, JSON),
    "gzip that is none": ("not gzip", BODY, JSON | {"Content-Encoding": "gzip"}),
    "gzip broken off": ("broken off", gzip.compress(BODY)[:-1], JSON | {"Content-Encoding": "gzip"}),
    "a bomb in gzip": ("6553500 bytes", gzip.compress(bytes(7_000_000)), {"Content-Encoding": "gzip"}),
    "gzip in two parts": (
        "one stream",
        gzip.compress(BODY[:9]) + gzip.compress(BODY[9:]),
        JSON | {"Content-Encoding": "gzip"},
    ),
    "bytes behind an image in JSON": (
        "bytes follow the json",
        BODY + b"abc",
        {"Inference-Header-Content-Length": str(len(BODY))},
    ),
    "an image and images": ("'image' and 'images'", PLAIN | {"images": [TEXT]}, JSON),
    "an image and tensors": ("'image' and 'inputs'", PLAIN | {"inputs": [tensor()]}, JSON),
    "null among the images": ("not null", {"images": [TEXT, None]}, JSON),
    "brotli": ("content-encoding 'br'", BODY, JSON | {"Content-Encoding": "br"}),
    "gzip without a word": ("but gzip", gzip.compress(PNG), {}),
    "a length of JSON that is stale": (
        "inference-header-content-length",
        {"inputs": [tensor()]},
        {"Inference-Header-Content-Length": "40"},
    ),
    "a length of JSON that is too long": (
        "inference-header-content-length",
        {"inputs": [tensor()]},
        {"Inference-Header-Content-Length": "4000"},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(name: str, manifest: Manifest) -> None:
    word, body, headers = REFUSED[name]
    said = ask(manifest, body, headers)
    assert isinstance(said, str)
    assert word in said.lower()
