"""The traced form of both StyleGAN2 encoders: the same numbers as `mlvgm.e4e` and `mlvgm.style_transformer`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.fold import conv_then_norm
from mlvgm.e4e import COARSE, MIDDLE, E4ePurifier, Encoder4Editing, StyleHead
from mlvgm.irse import STAGES, Pyramid, SqueezeExcite, Unit, enlarge_to
from mlvgm.style_transformer import BAND, CANVAS, HEADS, QueryLayer, StyleTransformerPurifier, resize
from mlvgm.stylegan2 import EqualLinear


class E4eEncoder(nn.Module):
    """images (B, 3, 256, 256) in [-1, 1] -> codes (B, n, d)."""

    def __init__(self, purifier: E4ePurifier) -> None:
        super().__init__()
        encoder, mean = purifier.encoder, purifier.latent_avg
        assert isinstance(encoder, Encoder4Editing)
        self.pyramid = FoldedPyramid(encoder)
        # Row 0 is added to every other row, its share of the mean code included.
        self.heads = nn.ModuleList(
            folded_head(head, mean[i] if i == 0 else mean[i] - mean[0]) for i, head in enumerate(encoder.styles)
        )

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pyramid(images)
        rows = [head(maps[0 if i < COARSE else 1 if i < MIDDLE else 2]) for i, head in enumerate(self.heads)]
        offsets = torch.stack([torch.zeros_like(rows[0]), *rows[1:]], dim=1)
        return rows[0][:, None] + offsets


def folded_head(head: nn.Module, shift: Tensor) -> nn.Sequential:
    """``head`` with the constant ``shift`` in its last bias."""
    assert isinstance(head, StyleHead)
    linear = plain_linear(head.linear)
    with torch.no_grad():
        linear.bias.add_(shift)
    return nn.Sequential(*head.convs, nn.Flatten(1), linear)
