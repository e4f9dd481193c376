"""python -m evaluation.comparators train NAME TRAIN.npz --out FOLDER: train a comparator, into FOLDER/NAME.safetensors.

TRAIN.npz is what ``python -m mlvgm.training.data GTSRB`` writes: images, labels and tracks. One track in ten is held
out; the test images are not needed.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from evaluation.comparators.autoencoders import SmallAVAE, SmallNDVAE
from evaluation.comparators.classifiers import PGD, Plain, Smoothed, Trades
from evaluation.comparators.training import Comparator, ComparatorError, train
from handlers.errors import MlvgmError
from mlvgm.npz import read_npz, whole_numbers
from mlvgm.training.data import SIDE, Signs, split_by_track

COMPARATORS: Mapping[str, Callable[[], Comparator]] = {
    "pgd": lambda: PGD(steps=8000),
    "trades": lambda: Trades(steps=8000),
    "another": lambda: Plain(steps=1650, batch=128, rate=2e-3, warmup=0.15),
    "smoothed": lambda: Smoothed(steps=8000, batch=128, rate=2e-3, warmup=0.15),
    "avae": lambda: SmallAVAE(steps=20_000, batch=128),
    "ndvae": lambda: SmallNDVAE(steps=20_000, batch=128),
}


def read_training(file: Path) -> tuple[Signs, Signs]:
    """Images to train on and those of held-out tracks.

    Raises:
        NpzError, ComparatorError: the file is not as described above.
    """
    arrays = read_npz(file, "labels", "tracks")
    images = arrays["images"]
    if images.shape[1:] != (SIDE, SIDE, 3):
        raise ComparatorError(f"{file}: images must be (N, {SIDE}, {SIDE}, 3), not {images.shape}")
    labels, tracks = (whole_numbers(file, arrays, name) for name in ("labels", "tracks"))
    return split_by_track(Signs(images, labels, tracks))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.comparators", description=__doc__)
    train_parser = parser.add_subparsers(required=True).add_parser("train")
    train_parser.add_argument("name", choices=COMPARATORS)
    train_parser.add_argument("images", type=Path)
    train_parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    train_parser.add_argument("--seconds", type=float, help="at most, of training (default: until all steps are made)")
    train_parser.add_argument("--steps", type=int, help="at most (default: the comparator's own)")
    train_parser.add_argument("--seed", type=int, default=1)
    train_parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    try:
        signs, comparator = read_training(args.images), COMPARATORS[args.name]()
        comparator = dataclasses.replace(comparator, steps=args.steps or comparator.steps)
        print(f"{args.name}: {len(signs[0])} images to train on, {len(signs[1])} held out", flush=True)
        file = args.out / f"{args.name}.safetensors"

        def say(line: str) -> None:
            print(f"{args.name}: {line}", flush=True)

        train(comparator, signs, file, torch.device(args.device), args.seconds, say, args.seed)
    except MlvgmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
