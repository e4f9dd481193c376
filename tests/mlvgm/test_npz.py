"""Files of arrays that are damaged, are something else, or hold something else: one error that names the file."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlvgm.npz import NpzError, read_npz, whole_numbers

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)


def _member(method: int = 0, flags: int = 0) -> Callable[[bytes], bytes]:
    """Another method or other flags for the first array, in both places where a zip file has them."""

    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            place = content.find(signature) + at
            changed[place : place + 4] = struct.pack("<HH", flags, method)
        return bytes(changed)

    return change


def _header(text: bytes) -> Callable[[bytes], bytes]:
    """Another header in the place of the first array, with a checksum that is right."""

    def change(_: bytes) -> bytes:

        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as packed:
            packed.writestr("images.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text)
        return stream.getvalue()

    return change


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "nothing in it": lambda _: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "one array, as np.save writes it": lambda content: content[content.index(b"\x93NUMPY") :],
    "pixels changed": lambda content: content.replace(IMAGES[0].tobytes(), bytes(192)),
    "said to be compressed by bzip2": _member(12),
    "said to be compressed by LZMA": _member(14),
    "a method that nobody knows": _member(99),
    "encrypted": _member(0, 1),
    "no array": _header(b"x" * 20),
    "a header that never ends": _header(b"(" * 9000),
    "more pixels than memory": _header(
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000000, 32, 32, 3)}\n"
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "set.npz"
    np.savez(file, images=IMAGES, labels=np.arange(4))
    assert set(read_npz(file, "labels", "tracks")) == {"images", "labels"}
    file.write_bytes(DAMAGE[name](file.read_bytes()))
    with pytest.raises(NpzError, match=r"set\.npz: cannot be read"):
        read_npz(file, "labels")


@pytest.mark.parametrize("deflated", [True, False])
def test_whatever_bytes_change_nothing_else_is_raised(deflated: bool, tmp_path: Path) -> None:
    file, random = tmp_path / "set.npz", np.random.default_rng(0)
    (np.savez_compressed if deflated else np.savez)(file, images=IMAGES, labels=np.arange(4))
    content = np.frombuffer(file.read_bytes(), np.uint8)
    for _ in range(300):
        changed = content.copy()
        changed[random.integers(0, len(content), 3)] = random.integers(0, 256, 3)
        file.write_bytes(changed.tobytes())
        try:
            arrays = read_npz(file, "labels")
            whole_numbers(file, arrays, "labels")
        except NpzError:
            continue


@pytest.mark.parametrize("labels", [np.zeros(4), np.arange(3), np.array(3), np.array(["a"] * 4), None])
def test_labels_must_be_whole_numbers(labels: np.ndarray | None, tmp_path: Path) -> None:
    file = tmp_path / "set.npz"
    np.savez(file, images=IMAGES, **({} if labels is None else {"labels": labels}))
    arrays = read_npz(file, "labels")
    with pytest.raises(NpzError, match=r"set\.npz: .*labels"):
        whole_numbers(file, arrays, "labels")
