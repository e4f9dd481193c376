"""ND-VAE (IEEE document 10387596): a small NVAE with noise at its input, a purifier that the paper compares with.

Modules have two names in the published checkpoints (``bn1`` is ``cell.0``), and so they do here.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlvgm.checkpoint import CheckpointError, Tensors, find_weights, load_tensors, read_checkpoint
from mlvgm.mixture import mixture_mean
from mlvgm.nvae_cells import DecoderCombiner, EncoderCombiner, soft_clamp
from mlvgm.purifier import Autoencoder, Purified

PRE_GROUPS = 2
MIXTURES = 10
EXPANSION = 2
MIN_SIGMA = 0.01
STEM = "stem.weight"


@dataclass(frozen=True)
class NDVAEConfig:
    """Shape of an ND-VAE: ``channels`` of the first layer, ``scales``, ``groups`` a scale, ``cells`` a group."""

    channels: int
    scales: int
    groups: int
    cells: int

    @property
    def factor(self) -> int:
        """Images over coarsest features in side, and coarsest features over the first layer's in channels."""
        return 2 ** (PRE_GROUPS + self.scales - 1)

    @classmethod
    def from_tensors(cls, tensors: Tensors, path: str | Path) -> "NDVAEConfig":
        stem = tensors[STEM]
        if not isinstance(stem, Tensor) or stem.ndim != 4 or not 0 < stem.shape[0] <= 1024:
            raise CheckpointError(f"{path}: {STEM!r} is no convolution of an image")
        scales, groups = _count(tensors, "decoder.dec_tower."), _count(tensors, "decoder.dec_tower.0.")
        cells = _count(tensors, "pre_proc.groups_list.0.")
        if not (0 < scales <= 8 and 0 < groups <= 64 and 0 < cells <= 16):
            counted = f"{scales} scales, {groups} groups and {cells} cells"
            raise CheckpointError(f"{path}: 'decoder.dec_tower' and 'pre_proc.groups_list' have {counted}: no ND-VAE")
        return cls(stem.shape[0], scales, groups, cells)


def _count(tensors: Tensors, prefix: str) -> int:
    """How many children the module of this name has."""
    names = [key.removeprefix(prefix) for key in tensors if isinstance(key, str) and key.startswith(prefix)]
    return len({name.partition(".")[0] for name in names})


class SqueezeExcite(nn.Module):
    """Gate the channels of (B, C, H, W) by their global means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.se = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x.mean(dim=(2, 3)))[:, :, None, None]


class HalvingSkip(nn.Module):
    """(B, C, H, W) to (B, 2C, H/2, W/2): four 1x1 convolutions, one for each of the pixels of a 2x2 square."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for i in range(4):
            self.add_module(f"conv_{i + 1}", nn.Conv2d(channels, channels // 2, 1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        corners = (x, x[:, :, 1:, 1:], x[:, :, :, 1:], x[:, :, 1:])
        return torch.cat([conv(corner) for conv, corner in zip(self.children(), corners, strict=True)], dim=1)


class EncoderCell(nn.Module):
    """Two batch-normed 3x3 convolutions, a gate and a skip; with ``halve``, sides halve and channels double."""

    def __init__(self, channels: int, *, halve: bool = False) -> None:
        super().__init__()
        width = channels * 2 if halve else channels
        self.skip = HalvingSkip(channels) if halve else nn.Identity()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2 if halve else 1, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.squeeze_excitation = SqueezeExcite(width)
        self.cell = nn.Sequential(
            self.bn1, nn.SiLU(), self.conv1, self.bn2, nn.SiLU(), self.conv2, self.squeeze_excitation
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.cell(x)


class DecoderCell(nn.Module):
    """Inverted bottleneck and a skip; with ``double``, sides double and channels halve.

    Args:
        channels: of the input.
        expansion: of the bottleneck's inner width.
    """

    def __init__(self, channels: int, expansion: int, *, double: bool = False) -> None:
        super().__init__()
        width, hidden = channels // 2 if double else channels, channels * expansion
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.bn_expanded1, self.bn_expanded2 = nn.BatchNorm2d(hidden), nn.BatchNorm2d(hidden)
        self.expand, self.expand2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, width, 1)
        depthwise = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)
        self.dep_sep_conv = nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=nn.Conv2d(hidden, hidden, 1)))
        self.squeeze_excitation = SqueezeExcite(width)
        layers: list[nn.Module] = [self.bn1, self.expand, self.bn_expanded1, nn.SiLU(), self.dep_sep_conv]
        layers += [self.bn_expanded2, nn.SiLU(), self.expand2, self.bn2, self.squeeze_excitation]
        if double:
            layers.insert(0, nn.UpsamplingNearest2d(scale_factor=2))
            self.skip: nn.Module = nn.Sequential(nn.UpsamplingBilinear2d(scale_factor=2), nn.Conv2d(channels, width, 1))
        else:
            self.skip = nn.Identity()
        self.cell = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.cell(x)


class DecoderGroup(nn.Module):
    """Cells in a row, and a combiner of what came in and what came out."""

    def __init__(self, channels: int, cells: int) -> None:
        super().__init__()
        self.combiner = DecoderCombiner(nn.Conv2d(2 * channels, channels, 1))
        self.group = nn.Sequential(*(DecoderCell(channels, EXPANSION) for _ in range(cells)))

    def forward(self, x: Tensor) -> Tensor:
        return self.combiner(x, self.group(x))


class Sampler(nn.Module):
    """Mean and standard deviation (B, C, h, w) of a latent: two linear maps of one feature map, added and squashed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cell = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.prior_cell = nn.Sequential(nn.ELU(), nn.Conv2d(channels, 2 * channels, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_sigma = soft_clamp(self.cell(x) + self.prior_cell(x)).chunk(2, dim=1)
        return mean, torch.exp(log_sigma) + MIN_SIGMA


class NDVAE(Autoencoder):
    """ND-VAE as a purifier. Its noise is (3, H, W) for the image, then one feature map a latent, coarse to fine.

    Args:
        config: its shape.
        h: (1, C, h, w), the constant that the decoder starts from. The published files lack it: the official code draws
            it anew, uniform in [0, 1), whenever it builds the model.
        noise_std: standard deviation of the input noise, in units of the [0, 1] image.
    """

    h: Tensor

    def __init__(self, config: NDVAEConfig, h: Tensor, noise_std: float) -> None:
        super().__init__()
        c, side = config, h.shape[-1]
        self.register_buffer("h", h, persistent=False)
        self.noise_std = noise_std
        self.image_size = side * c.factor
        width, top = c.channels << PRE_GROUPS, c.channels * c.factor
        self.stem = nn.Conv2d(3, c.channels, 3, padding=1)
        pre = [nn.Sequential(*_encoder_cells(c.channels << g, c.cells)) for g in range(PRE_GROUPS)]
        self.pre_proc = nn.ModuleDict({"groups_list": nn.ModuleList(pre), "tower": nn.Sequential(*pre)})
        down, up = [], []
        for s in range(c.scales):
            wide = width << s
            groups: list[nn.Module] = [
                nn.Sequential(*(EncoderCell(wide) for _ in range(c.cells))) for _ in range(c.groups)
            ]
            down.append(nn.Sequential(*groups, *([EncoderCell(wide, halve=True)] if s < c.scales - 1 else [])))
            wide = top >> max(s - 1, 0)
            groups = [DecoderGroup(wide, c.cells) for _ in range(c.groups)]
            up.append(nn.Sequential(*groups, *([DecoderCell(wide, EXPANSION, double=True)] if s else [])))
        latents = [top, *(top >> s for s in range(c.scales))]
        self.noise_shapes = ((3, self.image_size, self.image_size),)
        self.noise_shapes += tuple((z, side * top // z, side * top // z) for z in latents)
        combiners = nn.ModuleList(EncoderCombiner(nn.Conv2d(z, z, 1)) for z in latents[1:])
        self.encoder = nn.ModuleDict({"combiner_cells": combiners, "enc_tower": nn.ModuleList(down)})
        unused = nn.ModuleDict({"cell": nn.Sequential(nn.ELU(), nn.Conv2d(top, top, 1))})  # saved, but never called
        self.decoder = nn.ModuleDict(
            {
                "post_encoder": unused,
                "combiner_cells": nn.ModuleList(DecoderCombiner(nn.Conv2d(2 * z, z, 1)) for z in latents),
                "dec_tower": nn.ModuleList(up),
                "samplers": nn.ModuleList(Sampler(z) for z in latents),
            }
        )
        post: list[nn.Module] = []
        for g in range(PRE_GROUPS):
            wide = width >> (g + 1)
            # The published cells expand by their own width.
            post += [
                DecoderCell(2 * wide, EXPANSION, double=True),
                *(DecoderCell(wide, wide) for _ in range(c.cells - 1)),
            ]
        self.post_proc = nn.ModuleDict({"tower": nn.Sequential(*post)})
        self.image_conditional = nn.Sequential(nn.ELU(), nn.Conv2d(c.channels, 10 * MIXTURES, 3, padding=1))

    def encode(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, C_s, h_s, w_s), fine to coarse, of noisy ``images`` (B, 3, H, W) in [0, 1]."""
        features = [self.pre_proc["tower"](self.stem(2 * images - 1))]
        for scale in self.encoder["enc_tower"]:  # type: ignore[attr-defined]
            features.append(scale(features[-1]))
        return features

    def reconstruct(self, images: Tensor, noise: Sequence[Tensor]) -> Purified:
        features = self.encode((images + self.noise_std * noise[0]).clamp(0, 1))
        parts = {name: list(part.children()) for name, part in self.decoder.items()}
        x, seen = self.h.expand(len(images), -1, -1, -1), features.pop()
        means, latents = [], []
        for i, (sampler, combiner) in enumerate(zip(parts["samplers"], parts["combiner_cells"], strict=True)):
            if i:
                x = parts["dec_tower"][i - 1](x)
                seen = self.encoder["combiner_cells"][i - 1](features.pop(), x)  # type: ignore[index]
            mean, sigma = sampler(seen)
            means.append(mean)
            latents.append(mean + sigma * noise[i + 1])
            x = combiner(latents[-1], x)
        logits = self.image_conditional(self.post_proc["tower"](x))
        return Purified((mixture_mean(logits) + 1) / 2, tuple(means), tuple(latents))


def _encoder_cells(channels: int, cells: int) -> list[EncoderCell]:
    return [*(EncoderCell(channels) for _ in range(cells - 1)), EncoderCell(channels, halve=True)]


def read_ndvae(path: str | Path, h: Tensor) -> NDVAE:
    """The purifier of an ND-VAE checkpoint, a bare state dict; its shape comes from the file.

    Args:
        h: the constant that the decoder starts from, (1, C, h, w); its side gives the side of the images.

    Raises:
        CheckpointError: naming the file and the first key that is missing or wrong.
    """
    tensors = find_weights(read_checkpoint(path), STEM, path)
    config = NDVAEConfig.from_tensors(tensors, path)
    h = torch.as_tensor(h, dtype=torch.float32).clone()
    channels = config.channels * config.factor
    if h.ndim != 4 or tuple(h.shape[:2]) != (1, channels) or h.shape[2] != h.shape[3]:
        raise CheckpointError(f"{path}: 'h' must be (1, {channels}, h, h) for this file, not {tuple(h.shape)}")
    noise_std = 0.05 if h.shape[-1] * config.factor == 64 else 0.1  # as published
    with torch.device("meta"):  # the file's own tensors take the place of these
        purifier = NDVAE(config, h, noise_std)
    load_tensors(purifier, tensors, path)
    return purifier.eval().requires_grad_(False)
