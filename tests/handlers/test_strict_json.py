"""JSON and base64 as hostile clients write them."""

import base64
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.strict_json import RequestError, base64_bytes, json_object, quoted


def reason(body: object) -> str:
    with pytest.raises(RequestError) as caught:
        json_object(body)
    assert str(caught.value).isascii()
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON from line 1, column 1"),
        (b"[]", "JSON object"),
        (b"{", "JSON object"),
        (b'{"a": 1}}', "no JSON from line 1, column 9"),
        (b'{\n"a": 1,}', "no JSON from line 2, column"),
        (b'{"a": "\xe9"}', "not UTF-8"),
        (b"\xff\xfe{", "JSON object"),
        (b"{'a': 1}", "JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number is too long"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"samples": 1, "samples": 2}', "'samples' twice"),
        (b'{"a": {"\\u2603": 1, "\\u2603": 2}}', "'\\u2603' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": [-Infinity]}', "-Infinity"),
        (b'{"a": [' + b'"",' * 300_000 + b"0]}", "250000 lists, objects and texts"),
        (b'{"a": [' + b"[]," * 300_000 + b"0]}", "250000 lists, objects and texts"),
        ('{"a": [' + "{}," * 300_000 + "0]}", "250000 lists, objects and texts"),
        (None, "JSON object"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_what_is_no_json_object_is_refused(body: object, said: str) -> None:
    assert said in reason(body)


def test_odd_json_is_read() -> None:
    assert json_object('{"a": "\\ud800", "b": 1e999, "c": -0}') == {"a": "\ud800", "b": float("inf"), "c": 0}
    assert json_object('{"a": "\ud800"}') == {"a": "\ud800"}
    assert json_object('{"a": 1}'.encode("utf-16")) == {"a": 1}
    assert json_object(b'\xef\xbb\xbf \r\n{"a": 1}') == {"a": 1}
    assert json_object({"a": 1}) == {"a": 1}


def test_null_is_what_is_left_out() -> None:
    assert json_object(b'{"a": null, "b": 1, "c": [null]}') == {"b": 1, "c": [None]}


@pytest.mark.parametrize(
    "part", [b"[],", b"{},", b'"",', b"0,", b"1.5,", b'"\xe2\x98\x83",', b"[[[[0]]]],"], ids=lambda part: part.decode()
)
def test_memory_for_json_is_bounded(part: bytes) -> None:
    """6.5 MB of the parts that take the most for their length: at most twenty times that, and only while it is read."""
    body = b'{"a": [' + part * (6_500_000 // len(part)) + b"0]}"
    tracemalloc.start()
    try:
        json_object(body)
    except RequestError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 130_000_000


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=20))
def test_json_objects_come_back(value: object) -> None:
    assert json_object(json.dumps({"a": [value]}).encode()) == {"a": [value]}


@given(st.binary(max_size=200), st.integers(1, 100))
def test_base64_comes_back_however_it_is_wrapped(data: bytes, width: int) -> None:
    text = base64.b64encode(data).decode()
    assert base64_bytes("\r\n".join(text[i : i + width] for i in range(0, len(text), width))) == data


@given(st.binary(max_size=50))
def test_base64_comes_back_from_every_way_to_write_it(data: bytes) -> None:
    for text in (base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()):
        for start in ("", "data:;base64,", "data:image/png;base64,", "\n DATA:image/svg+xml;charset=utf-8;base64,"):
            assert base64_bytes(start + text) == base64_bytes(start + text.rstrip("=")) == data


@pytest.mark.parametrize("start", ["https://", "HTTP://", " https://", "file:///", "s3://"])
def test_addresses_are_not_fetched(start: str) -> None:
    with pytest.raises(RequestError, match="not fetched"):
        base64_bytes(f"{start}example.com/sign.png")


@pytest.mark.parametrize("text", ["%", "abcde", "a=bc", "\N{SNOWMAN}", "\ud800", "YQ==YQ==", "data:image/png,abcd"])
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="not valid base64"):
        base64_bytes(text)


def test_clients_words_are_shortened() -> None:
    assert quoted("x" * 100) == "'" + "x" * 40 + "'"
    assert quoted("\N{SNOWMAN}" * 100) == "'" + "\\u2603" * 10 + "'"
    assert [quoted(value) for value in ([], {}, None, 1.5, True)] == [
        "a list",
        "an object",
        "null",
        "a number",
        "true or false",
    ]
