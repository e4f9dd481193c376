"""Reading images to train on: folders as they are in the wild, npz files, and a split that keeps groups together."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from handlers.image import decode
from mlvgm.npz import NpzError
from mlvgm.training.images import augment, read_images
from mlvgm.training.settings import TrainingError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 pictures of several sizes and kinds at several depths, and a file that is none."""
    random = np.random.default_rng(0)
    for i in range(40):
        place = tmp_path / "pictures" / ("round" if i % 2 else "square") / f"{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (20 + i, 50 - i, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{i:02d}.{('png', 'jpg', 'bmp', 'webp')[i % 4]}")
    (tmp_path / "pictures" / "round" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_is_read_as_the_server_reads(folder: Path, tmp_path: Path, workers: int) -> None:
    images = read_images(folder, 32, 0.2, tmp_path / "cache", workers)
    assert images.images.shape == (40, 32, 32, 3)
    assert (len(images.train), len(images.validation)) == (32, 8)
    assert not set(images.train) & set(images.validation)
    assert images.classes == ("round", "square")
    assert len(images.unreadable) == 1
    assert "broken.png" in images.unreadable[0]
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stem != "broken")
    for place in (0, 17, 39):
        assert np.array_equal(images.images[place], decode(files[place].read_bytes(), (32, 32)))


def test_a_second_start_decodes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_images(folder, 32, 0.2, tmp_path / "cache")
    monkeypatch.setattr("mlvgm.training.images.decode", lambda *_: pytest.fail("decoded again"))
    second = read_images(folder, 32, 0.2, tmp_path / "cache")
    assert np.array_equal(first.images, second.images)
    assert first.digest == second.digest
    monkeypatch.undo()
    next(folder.rglob("04.png")).unlink()
    assert read_images(folder, 32, 0.2, tmp_path / "cache").digest != first.digest


def _edit(field: str, value: object) -> Callable[[Path, Path], object]:
    return lambda _, listing: listing.write_text(json.dumps({**json.loads(listing.read_text()), field: value}))


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "the array is cut off": lambda array, _: os.truncate(array, 5000),
    "the array is empty": lambda array, _: array.write_bytes(b""),
    "the array has another shape": lambda array, _: np.save(array, np.zeros((41, 16, 16, 3), np.uint8)),
    "the array has other pixels": lambda array, _: np.save(array, np.zeros((41, 32, 32, 3), np.uint8)),
    "the array is missing": lambda array, _: array.unlink(),
    "the array is a pipe": lambda array, _: (array.unlink(), os.mkfifo(array)),
    "the listing is cut off": lambda _, listing: os.truncate(listing, 20),
    "the listing is empty": lambda _, listing: listing.write_text(""),
    "the listing is no text": lambda _, listing: listing.write_bytes(b"\xff"),
    "the listing is a list": lambda _, listing: listing.write_text("[]"),
    "the listing is deep": lambda _, listing: listing.write_text("[" * 100_000),
    "the listing is a pipe": lambda _, listing: (listing.unlink(), os.mkfifo(listing)),
    "the listing leaves a file out": _edit("unreadable", []),
    "the listing has numbers": _edit("unreadable", [1, 2]),
    "the listing has another sum": _edit("sum", None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_cache_that_is_damaged_is_made_anew(name: str, folder: Path, tmp_path: Path) -> None:
    first = read_images(folder, 32, 0.2, tmp_path / "cache")
    pixels = first.images.copy()
    DAMAGE[name](tmp_path / "cache" / "images.npy", tmp_path / "cache" / "images.json")
    again = read_images(folder, 32, 0.2, tmp_path / "cache")
    assert np.array_equal(again.images, pixels)
    assert again.unreadable == first.unreadable
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"images.npy", "images.json"}


def test_a_disk_that_is_full_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TrainingError, match=r"images\.npy: No space left on device"):
        read_images(folder, 32, 0.2, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_groups_stay_on_one_side(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 20, 24, 3), np.uint8)
    labels, tracks = np.arange(60) // 30, np.arange(60) // 5 % 6
    np.savez(tmp_path / "signs.npz", images=images, labels=labels, tracks=tracks)
    read = read_images(tmp_path / "signs.npz", 32, 0.25, tmp_path)
    assert read.images.shape == (60, 32, 32, 3)
    sides = [set(zip(labels[part], tracks[part], strict=True)) for part in (read.train, read.validation)]
    assert not sides[0] & sides[1]
    assert len(read.validation) == 15


@pytest.mark.parametrize("name", ["missing", "empty", "text.npz", "floats.npz", "groups.npz"])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("not a zip file")
    np.savez(tmp_path / "floats.npz", images=np.zeros((4, 32, 32, 3)))
    np.savez(tmp_path / "groups.npz", images=np.zeros((4, 32, 32, 3), np.uint8), groups=np.arange(3))
    with pytest.raises((TrainingError, NpzError), match=name):
        read_images(tmp_path / name, 32, 0.2, tmp_path / "cache")


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", images=np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(TrainingError, match="4 images are too few"):
        read_images(tmp_path / "few.npz", 32, 0.1, tmp_path)


def test_augmented_images_stay_images() -> None:
    images = augment(torch.rand(8, 3, 32, 32))
    assert images.shape == (8, 3, 32, 32)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
