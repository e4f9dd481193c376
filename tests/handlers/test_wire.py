"""JSON and base64 as hostile clients write them."""

import base64
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.wire import RequestError, base64_bytes, json_object, quoted


def reason(body: object) -> str:
    with pytest.raises(RequestError) as caught:
        json_object(body)
    assert str(caught.value).isascii()
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "JSON object"),
        (b"[]", "JSON object"),
        (b"{", "JSON object"),
        (b'{"a": 1}}', "JSON object"),
        (b"\xff\xfe{", "JSON object"),
        (b"{'a': 1}", "JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON object"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON object"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "JSON object"),
        (b'{"samples": 1, "samples": 2}', "'samples' twice"),
        (b'{"a": {"\\u2603": 1, "\\u2603": 2}}', "'\\u2603' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": [-Infinity]}', "-Infinity"),
        (b'{"a": [' + b"[]," * 300_000 + b"0]}", "250000 lists and objects"),
        ('{"a": [' + "{}," * 300_000 + "0]}", "250000 lists and objects"),
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
    assert json_object({"a": 1}) == {"a": 1}


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
    assert json_object(json.dumps({"a": value}).encode()) == {"a": value}


@given(st.binary(max_size=200), st.integers(1, 100))
def test_base64_comes_back_however_it_is_wrapped(data: bytes, width: int) -> None:
    text = base64.b64encode(data).decode()
    assert base64_bytes("\r\n".join(text[i : i + width] for i in range(0, len(text), width))) == data


@pytest.mark.parametrize("text", ["%", "abc", "a=bc", "====", "\N{SNOWMAN}", "\ud800", "YQ==YQ==", "_-_-"])
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="not valid base64"):
        base64_bytes(text)


def test_clients_words_are_shortened() -> None:
    assert quoted("x" * 100) == "'" + "x" * 40 + "'"
    assert quoted("\N{SNOWMAN}" * 100) == "'" + "\\u2603" * 10 + "'"
    assert quoted([]) == "a list"
