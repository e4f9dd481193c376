"""IR-SE50, the face-recognition backbone of the StyleGAN2 encoders, with the feature pyramid on top.

Source: ArcFace (Deng et al., CVPR 2019) with squeeze-and-excitation; the pyramid is that of pSp (Richardson et al.,
CVPR 2021, section 3.1).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mlvgm.checkpoint import width

STAGES = (3, 4, 14, 3)  # units per stage; the first of each halves the image
REDUCTION = 16


class Widths(NamedTuple):
    """Channels of the stem and of the four stages."""

    stem: int = 64
    stage1: int = 64
    stage2: int = 128
    stage3: int = 256
    stage4: int = 512


def widths_like(tensors: Mapping[str, Any], prefix: str, path: str | Path) -> Widths:
    """The widths found in the tensors ``{prefix}input_layer...`` and ``{prefix}body...``."""
    firsts = [f"{prefix}body.{sum(STAGES[:i])}.res_layer.1.weight" for i in range(len(STAGES))]
    keys = [f"{prefix}input_layer.0.weight", *firsts]
    return Widths(*(width(tensors, key, 0, published, path) for key, published in zip(keys, Widths(), strict=True)))


class SqueezeExcite(nn.Module):
    """Scales the channels of (B, C, H, W) by a gate computed from their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // REDUCTION)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Unit(nn.Module):
    """Residual unit: (B, in, H, W) to (B, out, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if inputs == outputs:
            self.shortcut_layer = nn.MaxPool2d(1, stride)  # a mere subsampling
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            SqueezeExcite(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class Pyramid(nn.Module):
    """IR-SE50 and its feature pyramid: base class of both encoders.

    ``pyramid`` maps (B, 3, H, W) in [-1, 1] to three maps of ``widths.stage4`` channels, coarse to fine, of 1/16, 1/8
    and 1/4 of the image's size.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, widths.stem, 3, 1, 1, bias=False), nn.BatchNorm2d(widths.stem), nn.PReLU(widths.stem)
        )
        units, inputs = [], widths.stem
        for outputs, count in zip(widths[1:], STAGES, strict=True):
            for i in range(count):
                units.append(Unit(inputs, outputs, stride=2 if i == 0 else 1))
                inputs = outputs
        self.body = nn.Sequential(*units)
        self.latlayer1 = nn.Conv2d(widths.stage3, widths.stage4, 1)
        self.latlayer2 = nn.Conv2d(widths.stage2, widths.stage4, 1)

    def pyramid(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split2, split3 = sum(STAGES[:2]), sum(STAGES[:3])
        fine = self.body[:split2](self.input_layer(images))
        medium = self.body[split2:split3](fine)
        coarse = self.body[split3:](medium)
        medium = enlarge_to(coarse, medium) + self.latlayer1(medium)
        fine = enlarge_to(medium, fine) + self.latlayer2(fine)
        return coarse, medium, fine


def enlarge_to(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear enlargement to the height and width of ``like``, corners aligned."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)
