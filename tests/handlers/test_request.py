import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.image import encode_png
from handlers.manifest import Manifest, Samples
from handlers.request import MAX_BODY, MOST_IMAGES, OPTIONS, Request, parse
from handlers.strict_json import RequestError
from tests.handlers import forms

IMAGE = b"\x89PNG..."
BASE64 = base64.b64encode(IMAGE).decode()


@pytest.fixture(scope="module")
def manifest(nvae_bundle: Path) -> Manifest:
    return Manifest.read(nvae_bundle)


def reason(fields: dict[str, Any], headers: dict[str, Any], manifest: Manifest, allow_seed: bool = False) -> str:
    with pytest.raises(RequestError) as caught:
        parse(fields, headers, manifest, allow_seed)
    assert str(caught.value).isascii()
    assert "\n" not in str(caught.value)
    return str(caught.value)


EXPECTED = Request((IMAGE,), samples=3, top_k=2, wants_image=True, alphas="none", seed=7)
VALUES = {"samples": 3, "top_k": 2, "return": "purified", "alphas": "none", "seed": 7}
HEADERS = {f"x-MLVGM-{name.replace('_', '-')}": str(value) for name, value in VALUES.items()}
FORM = {name: bytearray(str(value).encode()) for name, value in VALUES.items()}
THROUGH_NGINX = {"X-Form-Type": forms.TYPE, "Content-Type": "application/octet-stream"}
JSON = {"image": BASE64, **VALUES}


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"body": bytearray(IMAGE)}, HEADERS),
        ({"data": IMAGE}, HEADERS),
        ({"image": bytearray(IMAGE), **FORM}, {"Content-Type": "multipart/form-data; boundary=x"}),
        ({"image": bytearray(IMAGE), **FORM}, {"image": {"content-type": "image/png"}}),
        ({"body": bytearray(forms.written(("image", IMAGE), *FORM.items()))}, THROUGH_NGINX),
        ({"body": forms.written(("image", json.dumps(JSON).encode()))}, THROUGH_NGINX),
        ({"body": JSON}, {"content-type": "application/json"}),
        ({"body": bytearray(json.dumps(JSON).encode())}, {"Content-Type": "application/json; charset=utf-8"}),
        ({"body": bytearray(json.dumps(JSON).encode())}, {}),
        ({"body": json.dumps(JSON)}, {"content-type": "text/plain"}),
        ({"body": {"image": BASE64}}, HEADERS),
        ({"body": JSON}, {"x-mlvgm-samples": "16"}),
    ],
)
def test_every_way_to_ask_gives_the_same_request(
    fields: dict[str, Any], headers: dict[str, Any], manifest: Manifest
) -> None:
    assert parse(fields, headers, manifest, allow_seed=True) == EXPECTED


def test_without_options_the_bundle_decides(manifest: Manifest) -> None:
    assert parse({"body": IMAGE}, {}, manifest) == Request((IMAGE,), 5, 3, False, "linear", None)


@pytest.mark.parametrize(
    ("accept", "wants_image"),
    [
        ("image/png", True),
        ("IMAGE/PNG;q=1", True),
        ("application/json, image/png", False),
        ("*/*", False),
        ("image/jpeg", False),
    ],
)
def test_accept_header(accept: str, wants_image: bool, manifest: Manifest) -> None:
    assert parse({"body": IMAGE}, {"Accept": accept}, manifest).wants_image == wants_image


def test_the_option_beats_the_accept_header(manifest: Manifest) -> None:
    headers = {"Accept": "image/png", "X-Mlvgm-Return": "json"}
    assert not parse({"body": IMAGE}, headers, manifest).wants_image


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("samples", 0, "1 to 16"),
        ("samples", 17, "1 to 16"),
        ("samples", "many", "1 to 16"),
        ("samples", 2.0, "1 to 16"),
        ("samples", True, "1 to 16"),
        ("samples", [4], "1 to 16"),
        ("samples", "-1", "1 to 16"),
        ("samples", "\N{ARABIC-INDIC DIGIT THREE}", "1 to 16"),
        ("samples", "9" * 5000, "1 to 16"),
        ("top_k", 4, "1 to 3"),
        ("return", "tiff", "'json', 'purified'"),
        ("alphas", "sine", "'linear', 'none'"),
        ("alphas", ["linear"], "'linear', 'none'"),
        ("seed", -1, "0 to 9223372036854775807"),
        ("seed", 2**63, "0 to 9223372036854775807"),
        ("\N{SNOWMAN}", 1, "samples, top_k, return, alphas, seed, certify"),
        ("image2", "x", "samples, top_k, return, alphas, seed, certify"),
    ],
)
def test_options_out_of_range_name_the_range(option: str, value: object, said: str, manifest: Manifest) -> None:
    assert said in reason({"body": {"image": BASE64, option: value}}, {}, manifest, allow_seed=True)


def test_unknown_headers_of_ours_are_refused(manifest: Manifest) -> None:
    assert "'sample'" in reason({"body": IMAGE}, {"X-Mlvgm-Sample": "3"}, manifest)


def test_headers_that_contradict_are_refused(manifest: Manifest) -> None:
    """A server hands on two spellings of a name as two headers."""
    for name, other in (("X-Mlvgm-Top-K", "x-mlvgm-top-k"), ("x-mlvgm-top-k", "X-MLVGM-Top_K")):
        assert parse({"body": IMAGE}, {name: "2", other: "2"}, manifest).top_k == 2
        assert "'top_k' is in two headers" in reason({"body": IMAGE}, {name: "2", other: "3"}, manifest)


def test_an_answer_never_names_more_than_a_thousand_classes(manifest: Manifest) -> None:
    many = replace(manifest, classes=tuple(f"class {i}" for i in range(20_000)))
    assert parse({"body": IMAGE}, {"X-Mlvgm-Top-K": "1000"}, many).top_k == 1000
    assert "1 to 1000" in reason({"body": IMAGE}, {"X-Mlvgm-Top-K": "1001"}, many)


def test_seeds_are_the_operators_choice(manifest: Manifest) -> None:
    assert "seed" in reason({"body": IMAGE}, {"X-Mlvgm-Seed": "3"}, manifest)


@pytest.mark.parametrize(
    ("fields", "headers", "said"),
    [
        ({}, {}, "one image"),
        ({"image": IMAGE, "data": IMAGE}, {}, "one image"),
        ({"file": IMAGE}, {}, "one image"),
        ({"\x89PNG": b""}, {"Content-Type": "application/x-www-form-urlencoded"}, "curl -T"),
        ({"body": {}}, {}, "no 'images' and no 'inputs'"),
        ({"body": {"instances": [BASE64]}}, {}, "but 'instances'"),
        ({"body": {"image": 3}}, {}, "base64"),
        ({"body": {"image": "%%%"}}, {}, "base64"),
        ({"body": {"image": "\N{SNOWMAN}"}}, {}, "base64"),
        ({"body": [BASE64]}, {}, "JSON object"),
        ({"body": bytearray(b'{"image": ')}, {"content-type": "application/json"}, "JSON object"),
        ({"body": bytearray(b"[" * 100_000)}, {"content-type": "application/json"}, "JSON object"),
        ({"body": "just text"}, {"content-type": "text/plain"}, "JSON object"),
        ({"body": 5}, {}, "JSON object"),
    ],
)
def test_requests_without_an_image_are_refused(
    fields: dict[str, Any], headers: dict[str, Any], said: str, manifest: Manifest
) -> None:
    assert said in reason(fields, headers, manifest)


def test_base64_may_be_wrapped(manifest: Manifest) -> None:
    long = bytes(range(256))
    wrapped = base64.encodebytes(long).decode()
    assert parse({"body": {"image": wrapped}}, {}, manifest).images == (long,)


def test_several_images_keep_their_order(manifest: Manifest) -> None:
    texts = [base64.b64encode(bytes([i])).decode() for i in range(3)]
    request = parse({"body": {"images": texts, "samples": 2}}, {}, manifest)
    assert request.images == (b"\0", b"\1", b"\2")
    assert request.layout == "list"
    assert parse({"body": {"image": BASE64}}, {}, manifest).layout == "one"


def test_a_form_through_nginx_can_have_several_images(manifest: Manifest) -> None:
    fields = [("image", b"1"), ("samples", b"2"), ("image", b"{2}"), ("image", b"3")]
    request = parse({"body": forms.written(*fields)}, THROUGH_NGINX, manifest)
    assert (request.images, request.samples, request.layout) == ((b"1", b"{2}", b"3"), 2, "list")


def test_images_of_a_form_may_be_in_base64_like_a_single_one(manifest: Manifest) -> None:
    image = encode_png(np.zeros((3, 8, 8), np.float32))
    texts = [base64.b64encode(image), b"data:image/png;base64," + base64.b64encode(image)]
    for count in (1, 2):
        fields = [("image", text) for text in texts[:count]]
        assert parse({"body": forms.written(*fields)}, THROUGH_NGINX, manifest).images == (image,) * count


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([], "one image"),
        ([("samples", b"2")], "one image"),
        ([("", IMAGE)], "one image"),
        ([("image", IMAGE), ("data", IMAGE)], "one image"),
        ([("image", IMAGE), ("image", IMAGE), ("data", IMAGE)], "any other once"),
        ([("image", IMAGE), ("samples", b"1"), ("samples", b"1")], "any other once"),
        ([("samples", b"1"), ("samples", b"1")], "any other once"),
        ([("image", IMAGE), ("sample", b"1")], "unknown option 'sample'"),
        ([("image", IMAGE)] * 17, "16 images at most"),
        ([("image", IMAGE)] * 5 + [("samples", b"16")], "64 at most"),
    ],
)
def test_forms_through_nginx_have_bounds(fields: list[tuple[str, bytes]], said: str, manifest: Manifest) -> None:
    assert said in reason({"body": forms.written(*fields)}, THROUGH_NGINX, manifest)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"images": []}, "1 to 16 images"),
        ({"images": [BASE64] * 17, "samples": 1}, "1 to 16 images"),
        ({"images": BASE64}, "1 to 16 images"),
        ({"images": [BASE64, 3]}, "base64"),
        ({"images": [BASE64], "image": BASE64}, "'image' and 'images'"),
        ({"images": [BASE64] * 5, "samples": 16}, "64 at most"),
        ({"images": [BASE64], "return": "purified"}, "one image a request"),
        ({"images": [BASE64] * 2, "seed": 2**63 - 1}, "0 to 9223372036854775806"),
    ],
)
def test_lists_of_images_have_bounds(entries: dict[str, Any], said: str, manifest: Manifest) -> None:
    assert said in reason({"body": entries}, {}, manifest, allow_seed=True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["image", "images", "data", "body", *OPTIONS]) | st.text(max_size=10)
headers = st.dictionaries(
    st.sampled_from(["Accept", "content-type", "X-Form-Type", *(f"X-Mlvgm-{o.title()}" for o in OPTIONS)])
    | st.text(max_size=10),
    st.text(max_size=20) | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=1),
    max_size=4,
)


@given(st.dictionaries(names, json_values | st.binary(max_size=20), max_size=4), headers, st.booleans())
def test_any_request_is_parsed_or_refused(
    manifest: Manifest, fields: dict[str, Any], headers: dict[str, Any], allow_seed: bool
) -> None:
    try:
        request = parse(fields, headers, manifest, allow_seed)
    except RequestError as error:
        refused = str(error)
    else:
        refused = None
    if refused is not None:
        assert refused.isascii()
        assert 0 < len(refused) < 200
        return
    assert all(isinstance(image, bytes) for image in request.images)
    assert 1 <= len(request.images) <= MOST_IMAGES
    if request.samples != "auto":
        assert 1 <= int(request.samples) <= 16
        assert len(request.images) * int(request.samples) <= 64
    assert 1 <= request.top_k <= 3
    assert request.alphas in manifest.alphas
    assert request.seed is None or (allow_seed and 0 <= request.seed < 2**63)


def test_samples_can_be_left_to_the_vote(manifest: Manifest) -> None:
    for fields, headers in (
        ({"body": IMAGE}, {"X-Mlvgm-Samples": "auto"}),
        ({"body": {"image": BASE64, "samples": "auto"}}, {}),
        ({"image": IMAGE, "samples": b"auto"}, {}),
        ({"body": {"images": [BASE64] * MOST_IMAGES, "samples": "auto"}}, {}),
    ):
        assert parse(fields, headers, manifest).samples == "auto"
    by_default = replace(manifest, samples=Samples("auto", 16))
    assert parse({"body": IMAGE}, {}, by_default).samples == "auto"
    assert parse({"body": IMAGE}, {"X-Mlvgm-Samples": "2"}, by_default).samples == 2


def test_torchserve_takes_the_largest_body_and_no_larger() -> None:
    settings = Path(__file__).parents[2] / "deploy" / "config.properties"
    assert f"max_request_size={MAX_BODY}" in settings.read_text().splitlines()
