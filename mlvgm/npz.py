"""Images and whole numbers about them in .npz files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.errors import MlvgmError
from mlvgm.files import open_file, replacing


class NpzError(MlvgmError, ValueError):
    """An .npz file is damaged, or lacks what is needed."""


def read_npz(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """The array "images", uint8 (N, H, W, 3), and those of ``names`` that are there.

    Raises:
        NpzError: the file is no .npz file, damaged, or has other images.
    """
    try:
        with open_file(path) as file, np.load(file) as packed:
            arrays = {name: packed[name] for name in ("images", *names) if name in packed.files}
        found = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
    except Exception as error:  # readers of archives raise almost anything for damaged ones
        raise NpzError(f"{path}: cannot be read as an npz file of arrays ({error or type(error).__name__})") from None
    images = arrays.get("images", np.empty(0))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise NpzError(f"{path}: must hold 'images', uint8 (N, H, W, 3), but has {found or 'nothing of that name'}")
    return arrays


def write_npz(path: Path, **arrays: NDArray[Any]) -> None:
    """Write ``path``, whole or not at all.

    Raises:
        OSError: as `mlvgm.files.replacing`.
    """
    with replacing(path) as draft, draft.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def whole_numbers(path: Path, arrays: Mapping[str, NDArray[Any]], name: str) -> NDArray[np.int64]:
    """The array ``name`` of `read_npz`, (N,): a whole number for each image.

    Raises:
        NpzError: it is something else, or missing.
    """
    if (array := arrays.get(name)) is None:
        raise NpzError(f"{path}: must hold '{name}', a whole number for each image")
    count = arrays["images"].shape[:1]
    if array.dtype.kind not in "iu" or array.shape != count:
        raise NpzError(f"{path}: {name} are {array.dtype} {array.shape}, must be whole numbers {count}")
    return array.astype(np.int64)
