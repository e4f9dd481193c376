"""Labelled photographs for measurements: the GTSRB benchmark, or a folder of the user."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from handlers.arrays import AnyFloats, Pixels
from handlers.errors import MlvgmError
from handlers.image import ImageError, decode
from mlvgm.files import image_files, read_file, shown
from mlvgm.npz import read_npz, whole_numbers
from mlvgm.training.data import Signs, load_signs, split_by_track


class PhotographError(MlvgmError):
    """Images or labels cannot be used."""


def read_validation(folder: Path, classes: Sequence[str], size: tuple[int, int], limit: int | None = None) -> Signs:
    """The first ``limit`` validation images in a fixed random order.

    Args:
        folder: GTSRB as `mlvgm.training.data.load_signs` takes it, of which these are the tracks that its training
            never saw; or images as validation/CLASS/IMAGE, where CLASS is a name of ``classes`` or its number.
        size: (H, W) of the images.

    Raises:
        FileNotFoundError: ``folder`` holds neither.
        PhotographError: a file is no image, or a folder no class.
    """
    own = folder / "validation"
    signs = _read_folders(own, classes, size) if own.is_dir() else split_by_track(load_signs(folder, "train"))[1]
    return _first(signs, limit)


def read_labelled(path: Path, classes: Sequence[str], size: tuple[int, int], limit: int | None = None) -> Signs:
    """The first ``limit`` labelled images in a fixed random order.

    Args:
        path: a folder with images as CLASS/IMAGE, where CLASS is a name of ``classes`` or its number; or an .npz file
            with "images", uint8 (N, H, W, 3), and "labels", (N,).
        size: (H, W) of the images.

    Raises:
        PhotographError, NpzError: it holds something else.
        ImageError, OSError: a file is no image, or cannot be read.
    """
    is_packed = path.suffix == ".npz" and path.is_file()
    return _first(_read_packed(path, len(classes), size) if is_packed else _read_folders(path, classes, size), limit)


def pictures(folder: Path | None, count: int, size: tuple[int, int]) -> Pixels:
    """At most ``count`` photographs of ``folder``, or without one `soft_pictures`: uint8 (N, H, W, 3).

    Raises:
        FileNotFoundError: ``folder`` holds no image.
        ImageError: a file is no image.
    """
    if folder is not None:
        files = list(image_files(folder))[:count]
        if not files:
            raise FileNotFoundError(f"{folder}: holds no images")
        return np.stack([decode(read_file(file), size) for file in files])
    return soft_pictures(count, size)


def soft_pictures(count: int, size: tuple[int, int], seed: int = 0) -> Pixels:
    """Random smooth pictures, uint8 (N, H, W, 3)."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        picture = np.zeros((*size, 3), np.float32)
        for cells in (2, 8, 32):
            grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            picture += np.asarray(grid.resize((size[1], size[0]), Image.Resampling.BICUBIC), np.float32) / 3
        drawn.append(picture.astype(np.uint8))
    return np.stack(drawn)


def to_pixels(images: AnyFloats) -> Pixels:
    """Values in [0, 1], clipped where generators overshoot, as 8 bits; of any shape."""
    return np.asarray((images * 255).round().clip(0, 255), np.uint8)


def encode(image: Pixels, format: str = "PNG") -> bytes:
    """The file of a uint8 (H, W, 3) image."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format)
    return stream.getvalue()


def _first(signs: Signs, limit: int | None) -> Signs:
    order = np.random.default_rng(0).permutation(len(signs))[:limit]
    return Signs(signs.images[order], signs.labels[order])


def _read_packed(path: Path, classes: int, size: tuple[int, int]) -> Signs:
    arrays = read_npz(path, "labels")
    images, labels = arrays["images"], whole_numbers(path, arrays, "labels")
    if images.shape[1:] != (*size, 3) or not len(images):
        raise PhotographError(f"{path}: images are {images.shape}, must be (N, {size[0]}, {size[1]}, 3)")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise PhotographError(f"{path}: has labels {labels.min()} to {labels.max()}, the bundle has {classes} classes")
    return Signs(images, labels)


def _read_folders(folder: Path, classes: Sequence[str], size: tuple[int, int]) -> Signs:
    numbers = {name: label for label, name in enumerate(classes)}
    images: list[Pixels] = []
    labels: list[int] = []
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        name = class_folder.name
        label = numbers.get(name, int(name) if re.fullmatch(r"[0-9]{1,9}", name) else -1)
        if not 0 <= label < len(classes):
            raise PhotographError(f"{shown(class_folder)}: is neither a label of the bundle nor the number of one")
        for path in image_files(class_folder):
            try:
                images.append(decode(read_file(path), size))
            except ImageError as error:
                raise PhotographError(f"{shown(path)}: {error}") from None
            labels.append(label)
    if not images:
        raise PhotographError(f"{shown(folder)}: no images in folders named like the classes, or by their numbers")
    return Signs(np.stack(images), np.array(labels, np.int64))
