"""Reading images to train on: folders as they are in the wild, npz files, and a split that keeps groups together."""

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
