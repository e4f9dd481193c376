"""Labelled photographs for measurements: the GTSRB benchmark, or a folder of the user."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.image import decode
from mlvgm.files import image_files, read_file
from mlvgm.training.data import Signs, load_signs, split_by_track


def read_photographs(
    folder: Path, part: str, classes: Sequence[str], size: tuple[int, int], limit: int | None = None
) -> Signs:
    """The first ``limit`` photographs in a fixed random order.

    Args:
        folder: GTSRB as `mlvgm.training.data.load_signs` takes it, or images as PART/CLASS/IMAGE, where CLASS is a name
            of ``classes`` or its number.
        part: "test" or "validation"; for GTSRB the latter are the tracks that its training never saw.
        size: (H, W) of the images.

    Raises:
        FileNotFoundError: ``folder`` holds neither.
        ImageError: a file is no image.
    """
    own = folder / part
    if own.is_dir():
        signs = _read_folders(own, classes, size)
    elif part == "test":
        signs = load_signs(folder, "test")
    else:
        signs = split_by_track(load_signs(folder, "train"))[1]
    order = np.random.default_rng(0).permutation(len(signs))[:limit]
    return Signs(signs.images[order], signs.labels[order])


def pictures(folder: Path | None, count: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """At most ``count`` photographs of ``folder``, or without one random smooth pictures: uint8 (N, H, W, 3).

    Raises:
        FileNotFoundError: ``folder`` holds no image.
        ImageError: a file is no image.
    """
    if folder is not None:
        files = list(image_files(folder))[:count]
        if not files:
            raise FileNotFoundError(f"{folder}: holds no images")
        return np.stack([decode(read_file(file), size) for file in files])
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(count):
        picture = np.zeros((*size, 3), np.float32)
        for cells in (2, 8, 32):
            grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            picture += np.asarray(grid.resize((size[1], size[0]), Image.Resampling.BICUBIC), np.float32) / 3
        drawn.append(picture.astype(np.uint8))
    return np.stack(drawn)


def encode(image: NDArray[np.uint8], format: str = "PNG") -> bytes:
    """The file of a uint8 (H, W, 3) image."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format)
    return stream.getvalue()


def _read_folders(folder: Path, classes: Sequence[str], size: tuple[int, int]) -> Signs:
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        for class_folder in (folder / name, folder / str(label)):
            for path in image_files(class_folder) if class_folder.is_dir() else ():
                images.append(decode(read_file(path), size))
                labels.append(label)
    if not images:
        raise FileNotFoundError(f"{folder}: no images in folders named like the classes, or by their numbers")
    return Signs(np.stack(images), np.array(labels, np.int64))
