"""The German Traffic Sign Recognition Benchmark (Stallkamp et al., Neural Networks 2012) at 32x32.

python -m mlvgm.training.data GTSRB packs the official folders as train.npz and test.npz, beside them.
"""

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mlvgm.npz import NpzError, read_npz, whole_numbers, write_npz
from mlvgm.training.images import hold_out, to_tensor

SIDE = 32


@dataclass(frozen=True)
class Signs:
    """Images uint8 (N, 32, 32, 3), labels int64 (N,) and, for training images, the track each frame belongs to."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    tracks: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, keep: NDArray[np.bool_]) -> "Signs":
        return Signs(self.images[keep], self.labels[keep], None if self.tracks is None else self.tracks[keep])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Float images (N, 3, 32, 32) in [0, 1] and labels."""
        return to_tensor(self.images), torch.from_numpy(self.labels)


def load_signs(folder: str | Path, part: str) -> Signs:
    """Read ``part`` ("train" or "test") from ``train.npz``/``test.npz`` or from the official GTSRB folders.

    Raises:
        FileNotFoundError: ``folder`` holds neither.
        NpzError: the npz file is damaged, or holds something else.
    """
    folder = Path(folder)
    packed = folder / f"{part}.npz"
    if packed.is_file():
        arrays = read_npz(packed, "labels", "tracks")
        tracks = whole_numbers(packed, arrays, "tracks") if part == "train" else None
        return Signs(arrays["images"], whole_numbers(packed, arrays, "labels"), tracks)
    official = {"train": folder / "Final_Training" / "Images", "test": folder / "Final_Test" / "Images"}[part]
    if official.is_dir():
        return _read_training(official) if part == "train" else _read_test(official)
    raise FileNotFoundError(f"{folder}: neither {packed.name} nor the official folder {official.relative_to(folder)}")


def split_by_track(signs: Signs, share: float = 0.1) -> tuple[Signs, Signs]:
    """Training and validation part. All frames of one physical sign fall on the same side."""
    if signs.tracks is None:
        raise ValueError("only training images have tracks to split by")
    validation = hold_out(signs.labels * 100_000 + signs.tracks, share)
    return signs.subset(~validation), signs.subset(validation)


def _read_training(folder: Path) -> Signs:
    images, labels, tracks = [], [], []
    for label_folder in sorted(p for p in folder.iterdir() if p.is_dir()):
        for file in sorted(label_folder.glob("*.ppm")):
            images.append(_read(file))
            labels.append(int(label_folder.name))
            tracks.append(int(file.stem.split("_")[0]))
    return Signs(np.stack(images), np.array(labels), np.array(tracks))


def _read_test(folder: Path) -> Signs:
    # Not GT-final_test.test.csv, which lies beside the official images and has no labels.
    listings = [place / "GT-final_test.csv" for place in (folder, *folder.parents[:2])]
    listing = next((file for file in listings if file.is_file()), None)
    if listing is None:
        raise FileNotFoundError(f"{folder}: the list of labels, GT-final_test.csv, is missing: put it here")
    with listing.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    images = np.stack([_read(folder / row["Filename"]) for row in rows])
    return Signs(images, np.array([int(row["ClassId"]) for row in rows]))


def _read(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def main() -> None:
    parser = argparse.ArgumentParser(prog="mlvgm.training.data", description="Pack GTSRB as train.npz and test.npz.")
    parser.add_argument("folder", type=Path, help="holds Final_Training/Images, Final_Test/Images, GT-final_test.csv")
    folder = parser.parse_args().folder
    for part in ("train", "test"):
        try:
            signs = load_signs(folder, part)
        except (FileNotFoundError, NpzError) as error:
            sys.exit(f"mlvgm.training.data: {error}")
        tracks = {} if signs.tracks is None else {"tracks": signs.tracks}
        write_npz(folder / f"{part}.npz", images=signs.images, labels=signs.labels, **tracks)
        print(f"{folder / part}.npz: {len(signs)} images")


if __name__ == "__main__":
    main()
