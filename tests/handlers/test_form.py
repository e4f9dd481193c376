import pytest

from handlers.form import read
from handlers.strict_json import RequestError
from tests.handlers.forms import TYPE, written


def test_fields_keep_their_order_and_their_bytes() -> None:
    fields = [
        ("image", bytes(range(256)) * 1000 + b"\r\n--"),
        ("samples", b"4"),
        ("image", b"\r\n--y\r\n"),
        ("\xe9", b""),
    ]
    assert read(written(*fields), TYPE) == fields


@pytest.mark.parametrize(
    "kind", ['multipart/form-data; boundary="x"', "Multipart/Form-Data; charset=utf-8; Boundary=x"]
)
def test_content_types_come_in_several_spellings(kind: str) -> None:
    assert read(written(("image", b"a")), kind) == [("image", b"a")]


def test_files_are_fields() -> None:
    head = b'Content-Type: image/png\r\nContent-Disposition: form-data; filename="a.png"; name=image\r\n'
    assert read(b"--x\r\n" + head + b"\r\na\r\n--x--", TYPE) == [("image", b"a")]


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "multipart/mixed; boundary=x", "multipart/form-data; boundary="]
)
def test_other_types_are_told_which_is_wanted(kind: str) -> None:
    with pytest.raises(RequestError, match="needs the content type"):
        read(written(("image", b"a")), kind)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x",
        b"a=b",
        b"--x\r\n\r\n--x--\r\n",
        b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="\xff"\r\n\r\na\r\n--x--\r\n',
        written(("image", b"a"))[:-4],
        written(("image", b"a")).replace(b"\r\n", b"\n"),
        written(*[("a", b"")] * 33),
        b"--x\r\n" + b"A: b\r\n" * 1000 + written(("image", b"a"))[5:],
        b"--x\r\nA: " + b"b" * 100_000 + written(("image", b"a"))[3:],
    ],
)
def test_malformed_forms_are_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="malformed, or broken off"):
        read(body, TYPE)
