"""Settings of a training run: which NVAE, on which images, for how long. Read from YAML, or made from a named size."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from handlers.errors import MlvgmError
from handlers.fields import FieldError, Length, Range, none_of, read_strict
from mlvgm.nvae import NVAEConfig
from mlvgm.yaml_file import read_yaml

SIZES = ("small", "base", "large")

Share = Annotated[float, Range(0.0, 1.0)]
Count = Annotated[int, Range(1, 4096)]
Few = Annotated[int, Range(1, 16)]


class TrainingError(MlvgmError, ValueError):
    """A model cannot be trained with these settings or on these images; nothing has been trained then."""


@dataclass(frozen=True)
class Shape:
    """The NVAE (see `mlvgm.nvae.NVAEConfig`), by what a user chooses.

    Attributes:
        latents_per_scale: coarse to fine. All equal, or each half of the next one (at least the first): what the
            published checkpoint format can say.
        halvings: how often the image is halved before its finest latents; those have image_size / 2^halvings pixels a
            side, the coarsest image_size / 2^(halvings + scales - 1).
        latent_channels: of each latent.
        channels: of the feature maps at full resolution; they double with each halving.
        expansion, kernel: of the decoder's depthwise cells.
    """

    latents_per_scale: Annotated[tuple[Annotated[int, Range(1, 64)], ...], Length(1, 8)]
    halvings: Annotated[int, Range(1, 6)] = 1
    latent_channels: Count = 8
    channels: Count = 16
    cells_per_latent: Few = 1
    cells_per_halving: Few = 1
    mixtures: Count = 3
    expansion: Count = 2
    kernel: Count = 3

    def config(self, image_size: int) -> NVAEConfig:
        """The network's configuration for images of ``image_size`` pixels a side.

        Raises:
            TrainingError: there is no such network, or the checkpoint format has no words for it.
        """
        config = NVAEConfig(
            resolution=image_size,
            groups=self.latents_per_scale,
            cells_per_group=self.cells_per_latent,
            latent_channels=self.latent_channels,
            flow_cells=0,
            channels=self.channels,
            blocks=self.halvings,
            cells_per_block=self.cells_per_halving,
            mixtures=self.mixtures,
            expansion=self.expansion,
            kernel=self.kernel,
        )
        scales = len(self.latents_per_scale)
        coarsest = 1 << (self.halvings + scales - 1)
        if image_size % coarsest:
            raise TrainingError(
                f"{scales} scales behind {self.halvings} halvings need an image_size that {coarsest} divides, "
                f"which {image_size} is not"
            )
        if self.kernel % 2 == 0:
            raise TrainingError(f"kernel is {self.kernel}, must be odd")
        if NVAEConfig.from_checkpoint(config.to_checkpoint()) != config:
            last = self.latents_per_scale[-1]
            halved = [max(last >> (scales - 1 - s), self.latents_per_scale[0]) for s in range(scales)]
            raise TrainingError(
                f"latents_per_scale is {list(self.latents_per_scale)}, which the checkpoint format cannot say: "
                f"all equal, or halving from fine to coarse, as {halved}"
            )
        return config


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that the trained weights depend on, apart from the images.

    Attributes:
        image_size: pixels a side; pictures are resized to it as the server resizes requests.
        shape: of the network.
        steps: of ``batch`` images each.
        rate: peak learning rate of Adamax; it rises for ``warmup`` steps and falls along a cosine.
        beta: weight of the divergence; below 1 reconstructions are sharper. It rises over ``beta_warmup`` of the steps.
        average: decay of the exponential moving average of the weights, which is what is written.
        whole: share of the images whose latents all come from the posterior. Those of the others are interpolated with
            draws from the prior, as in purification, by random schedules (`mlvgm.training.bound.random_schedules`).
        noise: largest standard deviation of the Gaussian noise that the encoder sees, in units of the [0, 1] image.
        least_noise: smallest standard deviation for the share ``noisy`` of the images, at most ``noise``.
        noisy: share of the images that get ``least_noise`` to ``noise``; the others get little or none.
        augment: strength of the random rotation, scale, shift and lighting of training images, 0 for none.
        validation: share of the images (whole groups, where the images have groups) that is held out.
        classifier: whose answers purification should keep, the name of a shipped recipe or a callable
            ``module:function`` that returns a `torch.nn.Module`; None trains for no classifier.
        stability: weight of the divergence of its answers (`mlvgm.training.bound.answer_divergence`), in nats an image,
            beside the bound, in nats a value of the image.
        start: weights of an NVAE of the same shape to go on from, a safetensors file; in YAML, relative to the file.
    """

    image_size: Annotated[int, Range(32, 256)]
    shape: Shape
    steps: Annotated[int, Range(1, 10_000_000)] = 20_000
    batch: Annotated[int, Range(2, 4096)] = 32
    rate: Annotated[float, Range(0.0, 1.0, exclusive=True)] = 3e-3
    warmup: Annotated[int, Range(1, 100_000)] = 100
    beta: Annotated[float, Range(0.0, 100.0, exclusive=True)] = 0.3
    beta_warmup: Share = 0.15
    average: Annotated[float, Range(0.0, 0.99999)] = 0.999
    whole: Share = 0.3
    noise: Annotated[float, Range(0.0, 1.0)] = 0.3
    least_noise: Annotated[float, Range(0.0, 1.0)] = 0.0
    noisy: Share = 0.4
    augment: Share = 0.6
    validation: Annotated[float, Range(0.0, 0.5, exclusive=True)] = 0.05
    seed: Annotated[int, Range(0, 2**31)] = 0
    classifier: Annotated[str, Length(1, 200)] | None = None
    stability: Annotated[float, Range(0.0, 100.0, exclusive=True)] = 0.3
    start: Path | None = None

    def __post_init__(self) -> None:
        if self.least_noise > self.noise:
            raise ValueError(f"least_noise is {self.least_noise}, must be at most noise, which is {self.noise}")

    @property
    def digest(self) -> str:
        """SHA-256 of all settings: a checkpoint belongs to one of these."""
        content = json.dumps(dataclasses.asdict(self), default=str, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def as_mapping(self) -> dict[str, Any]:
        """The settings as YAML has them; `read_settings` reads them back."""
        content = dataclasses.asdict(self)
        content["shape"]["latents_per_scale"] = list(self.shape.latents_per_scale)
        content["start"] = None if self.start is None else str(self.start)
        return content


def read_settings(file: Path, **changes: Any) -> TrainingSettings:
    """Settings from a YAML file; ``changes`` replace its fields.

    Raises:
        FieldError: naming the file, the field, what it holds and what may stand there.
    """
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise FieldError(f"{file}: holds no settings, but a {type(content).__name__}")
    settings = read_strict(TrainingSettings, content | changes, str(file))
    start = None if settings.start is None else (file.parent / settings.start).resolve()
    return dataclasses.replace(settings, start=start)


def named_settings(size: str, image_size: int, **changes: Any) -> TrainingSettings:
    """Settings of a named size (small, base, large) for images of ``image_size`` pixels a side.

    The coarsest latents have 4 to 8 pixels a side up to 128 pixels, and the finest about a half or a quarter of the
    image's.

    Raises:
        TrainingError: unknown size, or an image size that cannot be halved often enough.
    """
    if size not in SIZES:
        raise TrainingError(f"size is {none_of(size, SIZES)}")
    if not 32 <= image_size <= 256 or image_size % 8:
        raise TrainingError(f"image size is {image_size}, must be a multiple of 8 from 32 to 256")
    halvings = 1 if image_size <= 64 else 2
    # As many scales as leave at least 4 pixels a side, halve without a rest, and do not make the coarse ones too wide.
    depth = min(5, int(math.log2(image_size // 4)))
    while image_size % (1 << depth):
        depth -= 1
    scales = depth - halvings + 1
    finest, wide = {"small": (4, {}), "base": (4, BASE), "large": (8, LARGE)}[size]
    latents = tuple(max(finest >> (scales - 1 - s), 1) for s in range(scales))
    shape = Shape(latents_per_scale=latents, halvings=halvings, **wide)
    return read_strict(TrainingSettings, {"image_size": image_size, "shape": dataclasses.asdict(shape), **changes})


BASE: dict[str, int] = {"channels": 24, "expansion": 4, "mixtures": 5}
LARGE: dict[str, int] = {"channels": 32, "expansion": 6, "kernel": 5, "mixtures": 10, "cells_per_halving": 2}
