"""Tensors in and out, as KServe's clients write and read them."""

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.image import encode_png
from handlers.manifest import Manifest
from handlers.open_inference import OUTPUTS
from handlers.pipeline import Pipeline
from handlers.request import MOST_IMAGES, Request, parse
from handlers.service import Service
from handlers.settings import HandlerSettings
from handlers.strict_json import RequestError
from tests import bundles

WHITE = encode_png(np.ones((3, 8, 8), np.float32))  # overflows in the encoder of this bundle
PIXELS = bundles.images(3)
FILES = [encode_png(image.transpose(2, 0, 1).astype(np.float32) / 255) for image in PIXELS]
TEXTS = [base64.b64encode(file).decode() for file in FILES]
BYTES = {"name": "image", "datatype": "BYTES", "shape": [3], "data": TEXTS}


@pytest.fixture(scope="module")
def manifest(nvae_bundle: Path) -> Manifest:
    return Manifest.read(nvae_bundle)


@pytest.fixture(scope="module")
def service(nvae_bundle: Path) -> Iterator[Service]:
    with Pipeline.load(nvae_bundle, "onnxruntime", threads=1) as pipeline:
        yield Service(pipeline, HandlerSettings(allow_seed=True))


def read(manifest: Manifest, tensor: dict[str, Any], headers: dict[str, str] | None = None, **more: Any) -> Request:
    return parse({"body": {"inputs": [tensor], **more}}, headers or {}, manifest, allow_seed=True)


def binary(tensor: dict[str, Any], content: bytes, **more: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """A request with the binary data extension, as Triton's client sends it."""
    tensor = {**tensor, "parameters": {"binary_data_size": len(content)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}, **more}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "content-type": "application/octet-stream"}
    return {"body": bytearray(head + content)}, headers


def pixels(datatype: str, first: bool, nested: bool) -> dict[str, Any]:
    array = PIXELS.transpose(0, 3, 1, 2) if first else PIXELS
    values = array if datatype == "UINT8" else array / 255
    data = values.tolist() if nested else values.ravel().tolist()
    return {"name": "image", "datatype": datatype, "shape": list(array.shape), "data": data}


def test_encoded_images(manifest: Manifest) -> None:
    for shape, data in (([3], TEXTS), ([3, 1], [[text] for text in TEXTS])):
        request = read(manifest, {**BYTES, "shape": shape, "data": data}, parameters={"samples": 2, "top_k": 1})
        assert request.images == tuple(FILES)
        assert (request.samples, request.top_k) == (2, 1)
    assert read(manifest, BYTES, {"X-Mlvgm-Samples": "2"}).samples == 2


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_pixels(manifest: Manifest, datatype: str, first: bool, nested: bool) -> None:
    request = read(manifest, pixels(datatype, first, nested))
    assert np.array_equal(np.stack(request.images), PIXELS)


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_data_nested_otherwise_than_its_shape_says_is_refused(manifest: Manifest, datatype: str) -> None:
    """As flat numbers they would be as many, in another order: another picture."""
    first = pixels(datatype, True, True)
    last = pixels(datatype, False, True)
    rows = [row for image in last["data"] for row in image]
    ragged = [[image[0] + image[1], image[2], *image[2:]] for image in last["data"]]
    for shape, data in ((first["shape"], last["data"]), (last["shape"], first["data"]), (last["shape"], rows)):
        with pytest.raises(RequestError, match="flat, or nested as its shape says"):
            read(manifest, {**last, "shape": shape, "data": data})
    with pytest.raises(RequestError, match="flat, or nested as its shape says"):
        read(manifest, {**last, "data": ragged})
    by_image = [np.ravel(image).tolist() for image in last["data"]]
    assert np.array_equal(np.stack(read(manifest, {**last, "data": by_image}).images), PIXELS)


@pytest.mark.parametrize(("datatype", "dtype"), [("UINT8", "u1"), ("FP32", "<f4")])
def test_pixels_behind_the_json(manifest: Manifest, datatype: str, dtype: str) -> None:
    content = (PIXELS if datatype == "UINT8" else PIXELS / 255).astype(dtype).tobytes()
    fields, headers = binary({"name": "image", "datatype": datatype, "shape": list(PIXELS.shape)}, content)
    assert np.array_equal(np.stack(parse(fields, headers, manifest).images), PIXELS)


def test_encoded_images_behind_the_json(manifest: Manifest) -> None:
    content = b"".join(struct.pack("<I", len(file)) + file for file in FILES)
    fields, headers = binary({"name": "image", "datatype": "BYTES", "shape": [3]}, content)
    assert parse(fields, headers, manifest).images == tuple(FILES)
    in_base64 = b"".join(struct.pack("<I", len(text)) + text.encode() for text in TEXTS)
    fields, headers = binary({"name": "image", "datatype": "BYTES", "shape": [3]}, in_base64)
    assert parse(fields, headers, manifest).images == tuple(FILES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"datatype": "FP64"}, "BYTES"),
        ({"datatype": None}, "BYTES"),
        ({"shape": 3}, "shape"),
        ({"shape": [3.0]}, "shape"),
        ({"shape": [True]}, "shape"),
        ({"shape": [10**400]}, "shape"),
        ({"shape": [-3]}, "shape"),
        ({"shape": [2]}, "their number"),
        ({"shape": [17], "data": TEXTS * 6}, "1 to 16 images"),
        ({"data": []}, "1 to 16 images"),
        ({"data": "abc"}, "must be a list"),
        ({"data": ["a", "b", "%"]}, "base64"),
        ({"data": [1, 2, 3]}, "base64"),
        ({"data": [TEXTS[0], [TEXTS[1]], TEXTS[2]]}, "base64"),
        ({"data": None}, "no data"),
        ({"shape": [1] * 9}, "shape"),
        ({"parameters": {"samples": 3}}, "outside of it"),
        ({"parameters": []}, "must be an object"),
        ({"datatype": "UINT8"}, "shape (n, H, W, 3)"),
        ({"datatype": "UINT8", "shape": [1, 2, 2, 4], "data": [0] * 16}, "shape (n, H, W, 3)"),
        ({"datatype": "UINT8", "shape": [17, 1, 1, 3], "data": [0] * 51}, "n at most 16"),
        ({"datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0]}, "0 to 255"),
        ({"datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, 256]}, "0 to 255"),
        ({"datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, -1]}, "0 to 255"),
        ({"datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, 0.5]}, "whole numbers"),
        ({"datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, True]}, "0 to 255"),
        ({"datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, 10**400]}, "0 to 255"),
        ({"datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, "0"]}, "0 to 255"),
        ({"datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [[0, 0], 0]}, "0 to 255"),
        ({"datatype": "UINT8", "shape": [1, 20_000, 20_000, 3], "data": [0]}, "0 to 255"),
        ({"datatype": "FP32", "shape": [1, 1, 1, 3], "data": [0, 0, 1.01]}, "0 to 1"),
        ({"datatype": "FP32", "shape": [1, 1, 1, 3], "data": [0, 0, float("nan")]}, "0 to 1"),
        ({"datatype": "FP32", "shape": [1, 1, 1, 3], "data": [0, 0, float("inf")]}, "0 to 1"),
        ({"datatype": "FP32", "shape": [1, 1, 1, 3], "data": {"a": 1}}, "0 to 1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(manifest: Manifest, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(manifest, {**BYTES, **changes})
    assert said in str(caught.value)
    assert str(caught.value).isascii()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"inputs": []}, "one tensor"),
        ({"inputs": [BYTES, BYTES]}, "one tensor"),
        ({"inputs": [3]}, "one tensor"),
        ({"inputs": [BYTES], "id": 3}, "id"),
        ({"inputs": [BYTES], "id": "x" * 300}, "id"),
        ({"inputs": [BYTES], "parameters": [1]}, "parameters"),
        ({"inputs": [BYTES], "parameters": {"priorities": 1}}, "unknown option 'priorities'"),
        ({"inputs": [BYTES], "parameters": {"samples": 17}}, "1 to 16"),
        ({"inputs": [BYTES], "parameters": {"return": "purified"}}, "one image a request"),
        ({"inputs": [BYTES], "samples": 3}, "unknown entry 'samples'"),
        ({"inputs": [BYTES], "outputs": "label"}, "outputs"),
        ({"inputs": [BYTES], "outputs": [{"name": "logits"}]}, "unpurified_label"),
        ({"inputs": [BYTES], "outputs": [{"name": ["label"]}]}, "a list"),
        ({"inputs": [BYTES], "outputs": [{}]}, "called null"),
    ],
)
def test_envelopes_that_do_not_fit_are_refused(manifest: Manifest, entries: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse({"body": entries}, {}, manifest)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "size", "said"),
    [
        (b"\5\0\0\0abc", 7, "within an image"),
        (b"\3\0\0\0abc\0", 8, "within a length"),
        (b"\3\0\0\0abc", 6, "number of bytes"),
        (b"\3\0\0\0abc", True, "number of bytes"),
        (b"", 0, "1 to 16 images"),
    ],
)
def test_bytes_behind_the_json_must_fit(manifest: Manifest, content: bytes, size: int, said: str) -> None:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    with pytest.raises(RequestError, match=said):
        parse({"body": head + content}, {"inference-header-content-length": str(len(head))}, manifest)


@pytest.mark.parametrize("length", ["0", "-1", "9999", "x", "1e3"])
def test_the_length_of_the_json_must_fit(manifest: Manifest, length: str) -> None:
    fields, headers = binary({"name": "image", "datatype": "BYTES", "shape": [1]}, b"abc")
    with pytest.raises(RequestError, match="a whole number from 1 to"):
        parse(fields, headers | {"Inference-Header-Content-Length": length}, manifest)


def said(service: Service, body: Any, status: int = 200) -> dict[str, Any]:
    (answer,) = service.answer([({"body": body}, {})])
    assert (answer.status, answer.content_type) == (status, "application/json")
    assert answer.body.isascii()
    content: dict[str, Any] = json.loads(answer.body)
    return content


def test_answers_are_those_of_a_list_as_tensors(service: Service) -> None:
    options = {"seed": 7, "samples": 3, "top_k": 2}
    expected = said(service, {"images": TEXTS, **options})["answers"]
    answer = said(service, {"id": "\N{SNOWMAN}", "inputs": [BYTES], "parameters": options})
    assert {**answer, "outputs": []} == {
        "model_name": "tiny",
        "model_version": "1.0",
        "id": "\N{SNOWMAN}",
        "parameters": {"samples": 3},
        "outputs": [],
    }
    assert [output["name"] for output in answer["outputs"]] == list(OUTPUTS)
    outputs = {output["name"]: output for output in answer["outputs"]}
    for name in ("label", "index", "confidence", "agreement", "flagged"):
        assert outputs[name]["data"] == [each[name] for each in expected]
        assert outputs[name]["shape"] == [3]
    for name in ("label", "index", "confidence"):
        assert outputs[f"unpurified_{name}"]["data"] == [each["unpurified"][name] for each in expected]
    for name in ("label", "index", "confidence", "votes"):
        assert outputs[f"top_{name}"]["data"] == [entry[name] for each in expected for entry in each["top_k"]]
        assert outputs[f"top_{name}"]["shape"] == [3, 2]


def test_pixels_are_answered_like_the_files_they_came_from(service: Service) -> None:
    options = {"parameters": {"seed": 7}}
    expected = said(service, {"inputs": [BYTES], **options})
    assert said(service, {"inputs": [pixels("UINT8", True, False)], **options}) == expected


def test_only_the_outputs_that_are_wanted_come(service: Service) -> None:
    wanted = [{"name": "flagged"}, {"name": "label"}, {"name": "flagged"}]
    answer = said(service, {"inputs": [BYTES], "outputs": wanted})
    assert [output["name"] for output in answer["outputs"]] == ["flagged", "label"]
    assert "id" not in answer


def test_a_bad_image_fails_the_request_and_is_named(service: Service) -> None:
    data = [TEXTS[0], base64.b64encode(b"no").decode(), ""]
    refused = said(service, {"inputs": [{**BYTES, "data": data}]}, status=400)
    assert refused["error"] == "image 1: not a JPEG, PNG, WebP or BMP image; image 2: no image: the body is empty"
    data = [TEXTS[0], base64.b64encode(b"no").decode(), base64.b64encode(WHITE).decode()]
    assert "image 2: stage encode" in said(service, {"inputs": [{**BYTES, "data": data}]}, status=500)["error"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*TEXTS, "", "%", "\ud800"]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=3), children, max_size=2),
    max_leaves=12,
)
shapes = st.lists(st.integers(-1, 4) | st.sampled_from([3, 16, 17, 10**30]) | values, max_size=5) | values
tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": values,
        "datatype": st.sampled_from(["BYTES", "UINT8", "FP32", "INT64"]) | values,
        "shape": shapes,
        "data": st.lists(st.integers(-1, 256), min_size=3, max_size=12) | values,
        "parameters": st.just({}) | st.dictionaries(st.just("binary_data_size"), st.integers()) | values,
    },
)
envelopes = st.fixed_dictionaries(
    {"inputs": st.lists(tensors, min_size=1, max_size=1) | values},
    optional={
        "id": values,
        "parameters": st.dictionaries(st.sampled_from(["samples", "seed", "x"]), values) | values,
        "outputs": st.lists(st.fixed_dictionaries({"name": st.sampled_from(OUTPUTS) | values}), max_size=3) | values,
    },
)


@given(envelopes, st.binary(max_size=40))
def test_any_envelope_is_read_or_refused(manifest: Manifest, entries: dict[str, Any], content: bytes) -> None:
    head = json.dumps(entries).encode()
    for fields, headers in (
        ({"body": entries}, {}),
        ({"body": head + content}, {"inference-header-content-length": str(len(head))}),
    ):
        request = read_or_refused(fields, headers, manifest)
        if isinstance(request, str):
            assert request.isascii()
            assert 0 < len(request) < 400
            continue
        assert 1 <= len(request.images) <= MOST_IMAGES
        for image in request.images:
            assert isinstance(image, bytes) or (image.dtype == np.uint8 and image.shape[2:] == (3,))


def read_or_refused(fields: dict[str, Any], headers: dict[str, str], manifest: Manifest) -> Request | str:
    try:
        return parse(fields, headers, manifest)
    except RequestError as error:
        return str(error)
