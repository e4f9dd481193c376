from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.photographs import PhotographError, read_labelled, read_validation
from mlvgm.npz import NpzError

CLASSES = ("stop", "give way", "danger")


def _save(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), (shade, shade, shade)).save(path)


def test_folders_named_like_classes_or_by_their_numbers(tmp_path: Path) -> None:
    _save(tmp_path / "validation" / "stop" / "a.png", 10)
    _save(tmp_path / "validation" / "give way" / "deep" / "b.PNG", 20)
    _save(tmp_path / "validation" / "2" / "c.bmp", 30)
    (tmp_path / "validation" / "2" / "notes.txt").write_text("no image")
    signs = read_validation(tmp_path, CLASSES, (8, 8))
    assert signs.images.shape == (3, 8, 8, 3)
    assert {int(label): int(image[0, 0, 0]) for label, image in zip(signs.labels, signs.images, strict=True)} == {
        0: 10,
        1: 20,
        2: 30,
    }


def test_gtsrb_and_a_fixed_order(tmp_path: Path) -> None:
    images = np.arange(40, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3)
    labels = (np.arange(40) % 3).astype(np.uint8)
    np.savez(tmp_path / "train.npz", images=images, labels=labels, tracks=np.arange(40).astype(np.uint16))
    some, whole = read_validation(tmp_path, CLASSES, (32, 32), 2), read_validation(tmp_path, CLASSES, (32, 32))
    assert len(whole) == 4
    assert np.array_equal(whole.images[:2], some.images)
    assert (whole.labels == whole.images[:, 0, 0, 0] % 3).all()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_validation(tmp_path, CLASSES, (8, 8))
    (tmp_path / "validation").mkdir()
    with pytest.raises(PhotographError, match="classes"):
        read_validation(tmp_path, CLASSES, (8, 8))


def test_labelled_folders_and_a_packed_file(tmp_path: Path) -> None:
    _save(tmp_path / "set" / "give way" / "a.png", 10)
    _save(tmp_path / "set" / "00002" / "b.png", 20)
    signs = read_labelled(tmp_path / "set", CLASSES, (8, 8))
    assert sorted(zip(signs.labels.tolist(), signs.images[:, 0, 0, 0].tolist(), strict=True)) == [(1, 10), (2, 20)]
    np.savez(tmp_path / "set.npz", images=signs.images, labels=signs.labels.astype(np.uint8))
    assert sorted(read_labelled(tmp_path / "set.npz", CLASSES, (8, 8)).labels.tolist()) == [1, 2]
    assert len(read_labelled(tmp_path / "set.npz", CLASSES, (8, 8), 1)) == 1


def test_what_is_no_class_and_no_image_is_named(tmp_path: Path) -> None:
    _save(tmp_path / "a" / "yield" / "a.png", 10)
    _save(tmp_path / "b" / "3" / "a.png", 10)
    (tmp_path / "c" / "stop").mkdir(parents=True)
    (tmp_path / "c" / "stop" / "a.png").write_text("no image")
    for name, words in (("a", "yield: is neither"), ("b", "3: is neither"), ("c", r"a\.png: ")):
        with pytest.raises(PhotographError, match=words):
            read_labelled(tmp_path / name, CLASSES, (8, 8))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "labels"),
        ({"images": np.zeros((2, 8, 8, 3), np.float32), "labels": np.zeros(2, int)}, "uint8"),
        ({"images": np.zeros((2, 9, 8, 3), np.uint8), "labels": np.zeros(2, int)}, r"\(N, 8, 8, 3\)"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(3, int)}, "must be whole numbers"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.array([0, 3])}, "0 to 3"),
    ],
)
def test_packed_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises((PhotographError, NpzError), match=words):
        read_labelled(tmp_path / "set.npz", CLASSES, (8, 8))
