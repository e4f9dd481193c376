"""YAML files with what YAML allows and a file of settings does not."""

import os
from pathlib import Path

import pytest

from handlers.fields import FieldError
from mlvgm.yaml_file import MAX_BYTES, read_yaml


def test_yaml_and_json_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# ä\na: [1, 2.5]\nb: &x {c: no}\nd: *x\n", encoding="utf-8")
    assert read_yaml(file) == {"a": [1, 2.5], "b": {"c": False}, "d": {"c": False}}
    file.write_text('{"a": [1, 2.5], "b": {"c": null}}')
    assert read_yaml(file) == {"a": [1, 2.5], "b": {"c": None}}
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(file) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.yaml: is empty"),
        (b"# nothing\n---\n", "a.yaml: is empty"),
        (b"a: 1\nb: 2\na: 3\n", "a.yaml: line 3: the name 'a' stands twice"),
        (b"a:\n  b: 1\n  b: 2\n", "a.yaml: line 3: the name 'b' stands twice"),
        (b"a: [1\n", "a.yaml: line "),
        (b"a:\n\tb: 1\n", "a.yaml: line 2: "),
        (b"a: 1\nb: \xff\n", "a.yaml: line 2: not UTF-8"),
        (b"a: 1\nb: \x01\n", "control character"),
        (b"a: 1\n--- \nb: 2\n", "a.yaml: "),
        (b"a: *b\n", "a.yaml: line 1: found undefined alias"),
        (b"a: &a {b: 1}\nc: {<<: *a}\n", "a.yaml: line 2: merging with << is not supported"),
        (b"a: !!python/object/apply:os.getcwd []\n", "a.yaml: line 1: could not determine a constructor"),
        (b"a: 2024-13-45\n", "a.yaml: "),
        (b"a: " + b"9" * 5000 + b"\n", "a.yaml: "),
        (b"? [a]\n: 1\n", "a.yaml: line 1: found unhashable key"),
        (b"[" * 100_000, "a.yaml: "),
        (b"? " * 100_000, "a.yaml: "),
        (b"a: 1\n" * (MAX_BYTES // 4), f"more than {MAX_BYTES} bytes"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(FieldError) as caught:
        read_yaml(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_what_is_no_ordinary_file(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="is a folder"):
        read_yaml(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(FieldError, match="is not an ordinary file"):
        read_yaml(tmp_path / "pipe.yaml")
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none.yaml")
