"""Coverage-guided fuzzing of the request parser (`make fuzz`): whatever the body and headers, a bounded request or a
`RequestError`.

The first byte says how the body comes: by which name and content type, parsed as TorchServe may do it or not, as a form
that nginx passes on, or as JSON that nearly fits, which the further bytes choose.
"""

import base64
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris
import numpy as np

with atheris.instrument_imports(include=["handlers", "multipart"]):
    from handlers.manifest import Manifest
    from handlers.request import MOST_IMAGES, OPTIONS, parse
    from handlers.strict_json import RequestError

from tests import bundles
from tests.fuzz import growth
from tests.fuzz.image import fuzz
from tests.handlers import forms

IMAGE = base64.b64encode(b"\x89PNG...").decode()
TENSOR = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 128, 255]}
ENTRIES: list[dict[str, Any]] = [
    {"image": IMAGE, "samples": 3, "top_k": 2, "return": "purified", "alphas": "none", "seed": 7},
    {"images": [IMAGE, IMAGE], "samples": 2},
    {"id": "x", "inputs": [TENSOR], "parameters": {"samples": 2}, "outputs": [{"name": "label"}]},
    {"inputs": [{**TENSOR, "datatype": "FP32", "shape": [1, 3, 1, 1], "data": [[[0.5]], [[1]], [[0]]]}]},
    {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [IMAGE]}]},
]
BINARY = json.dumps({"inputs": [{**TENSOR, "data": 0, "parameters": {"binary_data_size": 3}}]}).replace(
    '"data": 0, ', ""
)
TYPES = ("", "application/json", "image/png", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x")
WORDS = [
    "image",
    "images",
    "inputs",
    "outputs",
    "parameters",
    "datatype",
    "shape",
    "data",
    "binary_data_size",
    "id",
    "name",
]
WORDS += [*OPTIONS, "BYTES", "UINT8", "FP32", "purified", "none", "linear", "NaN", "-Infinity", "1e999", "\\\\ud800"]
WORDS += ["\\x0D\\x0A--x", "Content-Disposition: form-data; name="]


def seeds() -> list[bytes]:
    bodies = [json.dumps(entries).encode() for entries in ENTRIES]
    made = [bytes([way]) + body for body in bodies for way in (0, 1, 16, 17)]
    return [
        *made,
        bytes([32]) + bytes([len(BINARY)]) + BINARY.encode() + b"abc",
        b"\0\x89PNG",
        bytes([64]) + b"3",
        bytes([8]) + forms.written(("image", b"\x89PNG..."), ("samples", b"3")),
        bytes([8]) + forms.written(("image", b"a"), ("image", b"b")),
        *(bytes([1]) + make(100) for make in growth.BODIES.values()),
        *(bytes([8]) + make(100) for make in growth.FORMS.values()),
        *random(),
    ]


def random() -> list[bytes]:
    generator = np.random.default_rng(0)
    return [bytes([128]) + generator.bytes(200) for _ in range(50)]


def request(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and headers, as TorchServe would hand them over."""
    way, body = data[0] if data else 0, data[1:]
    headers: dict[str, Any] = {"Content-Type": TYPES[way % len(TYPES)]}
    fields: dict[str, Any] = {("body", "body", "image", "x")[way % 4]: bytearray(body)}
    if way & 16:
        try:
            fields = {"body": json.loads(body)}
        except (ValueError, RecursionError):
            fields = {"body": body.decode("utf-8", "replace")}
    if way & 32:
        headers["Inference-Header-Content-Length"] = str(body[0] if body else 0)
        fields = {"body": bytearray(body[1:])}
    if way & 64:
        for name in ("Samples", "Top-K", "Return", "Alphas", "Seed"):
            headers[f"X-Mlvgm-{name}"] = body.decode("latin-1")
    if way & 8:
        headers["X-Form-Type"] = forms.TYPE
        fields = {"body": bytearray(body)}
    if way & 128:
        fields = {"body": odd_entries(atheris.FuzzedDataProvider(body))}
    return fields, headers


def odd_entries(choices: Any) -> dict[str, Any]:
    """A request of `ENTRIES` with some of its values exchanged for others, at any depth."""

    def odd(value: Any) -> Any:
        if choices.ConsumeIntInRange(0, 7) == 0:
            return odd_value()
        if isinstance(value, dict):
            kept = {name: odd(each) for name, each in value.items() if choices.ConsumeIntInRange(0, 15)}
            more = {choices.PickValueInList(WORDS): odd_value()} if choices.ConsumeIntInRange(0, 7) == 1 else {}
            return kept | more
        if isinstance(value, list):
            return [odd(each) for each in value for _ in range(choices.PickValueInList([1, 1, 1, 0, 2, 20]))]
        return value

    def odd_value() -> Any:
        if choices.ConsumeBool():
            return odd(choices.PickValueInList([*ENTRIES, TENSOR, [1, 2, 2, 3], [[[0.5]], [[1]]], {}]))
        number = choices.ConsumeIntInRange(-1, 300)
        numbers = [number, number / 100, math.nan, math.inf, 10**400, True]
        return choices.PickValueInList([*numbers, str(number), None, IMAGE, choices.ConsumeUnicode(8), *WORDS])

    return {name: odd(each) for name, each in choices.PickValueInList(ENTRIES).items()}


def checker(manifest: Manifest) -> Any:
    def check(data: bytes) -> None:
        fields, headers = request(data)
        try:
            found = parse(fields, headers, manifest, allow_seed=True)
        except RequestError as error:
            message = str(error)
            assert message.isascii()
            assert 0 < len(message) < 400
            return
        assert 1 <= len(found.images) <= MOST_IMAGES
        if found.samples != "auto":
            assert 1 <= found.samples <= manifest.samples.max
            assert len(found.images) * found.samples <= 4 * manifest.samples.max
        assert 1 <= found.top_k <= len(manifest.classes)
        assert found.alphas in manifest.alphas
        for image in found.images:
            assert isinstance(image, bytes) or (image.shape[2:] == (3,) and image.nbytes <= len(data))

    return check


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        manifest = bundles.write_nvae(Path(folder))
    fuzz(checker(manifest), seeds(), sys.argv, WORDS, max_len=2048, timeout=20, rss_limit_mb=2048)
