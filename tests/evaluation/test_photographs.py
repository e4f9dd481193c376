from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.photographs import read_photographs

CLASSES = ("stop", "give way", "danger")


def _save(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), (shade, shade, shade)).save(path)


def test_folders_named_like_classes_or_by_their_numbers(tmp_path: Path) -> None:
    _save(tmp_path / "test" / "stop" / "a.png", 10)
    _save(tmp_path / "test" / "give way" / "deep" / "b.PNG", 20)
    _save(tmp_path / "test" / "2" / "c.bmp", 30)
    (tmp_path / "test" / "2" / "notes.txt").write_text("no image")
    signs = read_photographs(tmp_path, "test", CLASSES, (8, 8))
    assert signs.images.shape == (3, 8, 8, 3)
    assert {int(label): int(image[0, 0, 0]) for label, image in zip(signs.labels, signs.images, strict=True)} == {
        0: 10,
        1: 20,
        2: 30,
    }


def test_gtsrb_and_a_fixed_order(tmp_path: Path) -> None:
    images = np.arange(40, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3)
    labels = (np.arange(40) % 3).astype(np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=labels)
    np.savez(tmp_path / "train.npz", images=images, labels=labels, tracks=np.arange(40).astype(np.uint16))
    some = read_photographs(tmp_path, "test", CLASSES, (32, 32), 10)
    more = read_photographs(tmp_path, "test", CLASSES, (32, 32), 20)
    assert np.array_equal(more.images[:10], some.images)
    assert (some.labels == some.images[:, 0, 0, 0] % 3).all()
    assert len(read_photographs(tmp_path, "validation", CLASSES, (32, 32))) == 4


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    with pytest.raises(FileNotFoundError, match="classes"):
        read_photographs(tmp_path, "test", CLASSES, (8, 8))
    with pytest.raises(FileNotFoundError):
        read_photographs(tmp_path, "validation", CLASSES, (8, 8))
