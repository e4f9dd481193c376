"""Images to train on: a folder of pictures or an npz file, as one array on disk."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from handlers.image import ImageError, decode
from mlvgm.files import image_files, read_file, replacing
from mlvgm.npz import read_npz, whole_numbers
from mlvgm.training.settings import TrainingError

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageSet:
    """Images for training and those that are held out.

    Attributes:
        images: uint8 (N, S, S, 3), in memory or mapped from disk.
        train, validation: the places in it of either part.
        classes: names of the sub-folders where all pictures are in such, else empty.
        source: what the images came from, for the model card.
        digest: SHA-256 of what was read.
        unreadable: files that are no picture, each with the reason.
    """

    images: Pixels
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    classes: tuple[str, ...]
    source: str
    digest: str
    unreadable: tuple[str, ...] = ()


def read_images(source: Path, image_size: int, validation: float, cache: Path, workers: int = 1) -> ImageSet:
    """Read ``source`` and hold a part of it out.

    Args:
        source: a folder with pictures at any depth, or an npz file with ``images``, uint8 (N, H, W, 3), and perhaps
            ``groups`` or ``tracks`` with ``labels``: whole numbers (N,); images of one group stay on one side.
        image_size: pixels a side; pictures are resized to it as the server does.
        validation: share of the images, or of the groups, to hold out.
        cache: folder where the decoded pictures are kept for the next start.
        workers: processes that decode.

    Raises:
        NpzError: the npz file is damaged, or holds something else.
        TrainingError: there are no images to read, or too few to hold some out.
    """
    if source.is_dir():
        images, files, digest, unreadable = _read_folder(source, image_size, cache, workers)
        groups, classes = None, _classes(source, files)
    elif source.suffix == ".npz" and source.is_file():
        images, groups, digest = _read_npz(source, image_size)
        classes, unreadable = (), []
    else:
        raise TrainingError(f"{source}: neither a folder of pictures nor an npz file")
    held_out = hold_out(groups if groups is not None else np.arange(len(images)), validation)
    if not held_out.any() or held_out.all():
        raise TrainingError(f"{source}: {len(images)} images are too few to hold {validation:.0%} out")
    train, held = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    return ImageSet(images, train, held, classes, source.name, digest, tuple(unreadable))


def to_tensor(images: Pixels, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, S, S, 3) as float (B, 3, S, S) in [0, 1], channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255.0


def augment(images: Tensor, strength: float = 1.0) -> Tensor:
    """Random small rotation, scale, shift and lighting of images (B, 3, H, W) in [0, 1]."""
    batch, device = len(images), images.device
    angle = (torch.rand(batch, device=device) - 0.5) * 0.44 * strength
    scale = 1.0 + (torch.rand(batch, device=device) - 0.5) * 0.3 * strength
    theta = torch.zeros(batch, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.cos(angle) * scale
    theta[:, 0, 1], theta[:, 1, 0] = -torch.sin(angle) * scale, torch.sin(angle) * scale
    theta[:, :, 2] = (torch.rand(batch, 2, device=device) - 0.5) * 0.3 * strength
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain = torch.exp((torch.rand(batch, 1, 1, 1, device=device) - 0.5) * 1.0 * strength)
    offset = (torch.rand(batch, 1, 1, 1, device=device) - 0.5) * 0.2 * strength
    return (moved * gain + offset).clamp(0.0, 1.0)


def hold_out(groups: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Which images are held out: whole groups, drawn at random but always the same."""
    unique = np.unique(groups)
    chosen = np.random.default_rng(0).permutation(unique)[: round(share * len(unique))]
    return np.isin(groups, chosen)


def _read_npz(source: Path, image_size: int) -> tuple[Pixels, NDArray[np.int64] | None, str]:
    arrays = read_npz(source, "groups", "labels", "tracks")
    images: Pixels = arrays["images"]
    groups = whole_numbers(source, arrays, "groups") if "groups" in arrays else None
    if groups is None and {"tracks", "labels"} <= arrays.keys():  # a track has its number within its class
        labels, tracks = (whole_numbers(source, arrays, name) for name in ("labels", "tracks"))
        groups = labels * 100_000 + tracks
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    if images.shape[1:3] != (image_size, image_size):
        images = np.array([decode(np.ascontiguousarray(image), (image_size, image_size)) for image in images])
    return images, groups, digest


def _read_folder(source: Path, image_size: int, cache: Path, workers: int) -> tuple[Pixels, list[Path], str, list[str]]:
    """The readable pictures in the order of their names, their files, a digest, and what is wrong with the others."""
    files = sorted(image_files(source, apart_from=cache))
    if not files:
        raise TrainingError(f"{source}: holds no pictures")
    stamps = [f"{file.relative_to(source)} {_stamp(file)}" for file in files]
    digest = hashlib.sha256("\n".join([str(image_size), *stamps]).encode("utf-8", "surrogateescape")).hexdigest()
    array, listing = cache / "images.npy", cache / "images.json"
    if (unreadable := _known(listing, array, digest)) is None:
        unreadable = _decode_all(files, image_size, array, workers)
        with replacing(listing) as draft:
            draft.write_text(json.dumps({"unreadable": unreadable, "sum": _sum(array, digest, unreadable)}))
    bad = {line.partition(": ")[0] for line in unreadable}
    readable = [file for file in files if str(file) not in bad]
    return np.load(array, mmap_mode="r")[: len(readable)], readable, digest, unreadable


def _known(listing: Path, array: Path, digest: str) -> list[str] | None:
    """What the listing says is unreadable; None where it or the array is missing, damaged, altered, or of others."""
    try:
        kept = json.loads(read_file(listing))
        unreadable: list[str] = kept["unreadable"]
        return unreadable if kept["sum"] == _sum(array, digest, unreadable) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _sum(array: Path, digest: str, unreadable: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([digest, _stamp(array), unreadable]).encode()).hexdigest()


def _stamp(file: Path) -> str:
    """Changes with the content, as far as the file system tells."""
    try:
        status = file.stat()
    except OSError as error:
        return str(error.strerror)
    return f"{status.st_size} {status.st_mtime_ns}"


def _decode_all(files: Sequence[Path], image_size: int, array: Path, workers: int) -> list[str]:
    """Write those that are pictures to the front of ``array``, which is a file and not held in memory."""
    unreadable: list[str] = []
    array.parent.mkdir(parents=True, exist_ok=True)
    array.unlink(missing_ok=True)
    pictures = np.lib.format.open_memmap(array, "w+", np.uint8, (len(files), image_size, image_size, 3))
    try:
        with array.open("rb+") as stream:  # else a full disk would kill the process
            os.posix_fallocate(stream.fileno(), 0, array.stat().st_size)
    except OSError as error:
        array.unlink()
        raise TrainingError(f"{array}: {error.strerror}; give another --work, or make room") from None
    bar = tqdm(_decoded(files, image_size, workers), "reading pictures", len(files), unit="", disable=None)
    for i, (file, picture) in enumerate(zip(files, bar, strict=True)):
        if isinstance(picture, str):
            unreadable.append(f"{file}: {picture}")
        else:
            pictures[i - len(unreadable)] = picture
    if len(unreadable) == len(files):
        raise TrainingError(f"no picture can be read, the first because: {unreadable[0]}")
    pictures.flush()
    return unreadable


def _decoded(files: Sequence[Path], image_size: int, workers: int) -> Iterator[Pixels | str]:
    jobs = ((str(file), image_size) for file in files)
    if workers <= 1:
        yield from map(_decode_one, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_decode_one, jobs, chunksize=16)


def _decode_one(job: tuple[str, int]) -> Pixels | str:
    file, image_size = job
    try:
        return decode(read_file(Path(file)), (image_size, image_size))
    except ImageError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def _classes(source: Path, files: Sequence[Path]) -> tuple[str, ...]:
    """Names of the sub-folders, as in an ImageFolder, where every picture is in one."""
    parts = [file.relative_to(source).parts for file in files]
    names = sorted({part[0] for part in parts})
    return tuple(names) if len(names) > 1 and all(len(part) > 1 for part in parts) else ()
