"""Train an NVAE that purifies on images, whose labels are not needed.

Writes weights, a recipe for mlvgm export, a model card and pictures. A run that was stopped goes on when the same
command is given again.

Example: mlvgm train photos/ --image-size 64 --size small --out models/photos
"""

import argparse
import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlvgm.cli.options import Parser, add_threads

if TYPE_CHECKING:
    from mlvgm.training.settings import TrainingSettings


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("images", type=Path, help="folder of pictures at any depth, or an npz file with 'images'")
    add("--out", type=Path, required=True, help="folder for the model")
    add("--work", type=Path, help="folder for the checkpoint and pictures (default: OUT/work)")
    add("--settings", type=Path, metavar="YAML", help="all settings, instead of --size and --image-size")
    add("--size", choices=("small", "base", "large"), help="of the network (default: small)")
    add("--image-size", type=int, metavar="PIXELS", help="side, a multiple of 8 from 32 to 256")
    add("--steps", type=int, help="of the optimiser, instead of the settings'")
    add("--batch", type=int, help="images a step, instead of the settings'")
    add("--noise", type=float, help="largest deviation of the noise the encoder learns to leave out")
    add("--whole", type=float, metavar="SHARE", help="images trained with nothing resampled")
    add("--classifier", metavar="NAME", help="whose answers to keep: module:function, or the name of a shipped recipe")
    add("--start", type=Path, metavar="WEIGHTS", help="safetensors of the same shape to go on from")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_threads(parser)
    add("--workers", type=int, default=os.cpu_count(), help="processes that read pictures")


def run(args: argparse.Namespace) -> int:
    """Read the images, train or go on, and write the model; says beforehand how long a step takes."""
    import torch

    from mlvgm.cli.claim import claim
    from mlvgm.training.images import read_images, to_tensor
    from mlvgm.training.nvae import train_nvae
    from mlvgm.training.picture import IMAGES, draw_latents
    from mlvgm.training.publish import RECIPE, TEMPERATURE, publish
    from mlvgm.training.settings import TrainingError
    from mlvgm.training.trial import try_step

    settings = _settings(args)
    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TrainingError(f"--device {device}: PyTorch finds no GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    work = args.work or args.out / "work"
    with claim(work):
        images = read_images(args.images, settings.image_size, settings.validation, work, args.workers)
        for line in images.unreadable[:5]:
            print(f"left out: {line}")
        if len(images.unreadable) > 5:
            print(f"left out: {len(images.unreadable) - 5} more")
        print(f"{len(images.train):,} images to train on, {len(images.validation):,} held out")
        trial = try_step(settings, device, args.threads)
        print(
            f"{trial.parameters:,} parameters; {trial.seconds:.2f} s a step and {trial.memory / 1e9:.1f} GB of memory: "
            f"about {trial.seconds * settings.steps / 3600:.1f} h for {settings.steps:,} steps on {device}"
        )
        shown = to_tensor(images.images[images.validation[:: max(1, len(images.validation) // IMAGES)]], device)

        def draw(network: object, step: int) -> None:
            draw_latents(network, shown, TEMPERATURE, work / f"step-{step:07d}.png")  # type: ignore[arg-type]

        network, reports = train_nvae(settings, images, work, device, trial.channels_last, draw)
        draw_latents(network, shown.cpu(), TEMPERATURE, args.out / "latents.png")
        publish(network, reports, settings, images, args.out, images.classes, shlex.join(["mlvgm", *sys.argv[1:]]))
    print(f"Next: mlvgm export --recipe {args.out / RECIPE} --classifier FILE.onnx")
    return 0


def _settings(args: argparse.Namespace) -> "TrainingSettings":
    from mlvgm.training.settings import TrainingError, named_settings, read_settings

    names = ("steps", "batch", "noise", "whole", "classifier")
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.settings is None:
        if args.image_size is None:
            raise TrainingError("give --image-size PIXELS (and --size), or --settings YAML")
        settings = named_settings(args.size or "small", args.image_size, **changes)
    elif args.size or args.image_size:
        raise TrainingError("--settings says size and image size already: leave out --size and --image-size")
    else:
        settings = read_settings(args.settings, **changes)
    if args.start is not None:
        settings = dataclasses.replace(settings, start=args.start.resolve())
    settings.shape.config(settings.image_size)  # a shape that cannot be written is refused before anything is read
    return settings
