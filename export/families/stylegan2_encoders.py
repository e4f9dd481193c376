"""Both StyleGAN2 encoders rewritten for export: the same numbers as `mlvgm.e4e` and `mlvgm.style_transformer`.

- Batch norms after a convolution are folded into it, the mean code into the last biases.
- The queries of Style Transformer do not depend on the image: after the mapping network and the first self-attention
  they are still constants, computed in advance.
- Cross-attention does not project keys and values for the thousands of pixels of a feature map. A score is
  ``(W_q x + b_q) . (W_k t + b_k)``: W_k is applied to the few queries instead, and b_k adds the same to all scores, so
  the softmax cancels it. W_v and the output projection are applied to the few weighted sums of pixels.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from export.fold import conv_then_norm, linear
from mlvgm.e4e import COARSE, MIDDLE, E4ePurifier, Encoder4Editing, StyleHead
from mlvgm.irse import STAGES, Pyramid, Unit, enlarge_to
from mlvgm.style_transformer import BAND, CANVAS, HEADS, QueryLayer, StyleTransformerPurifier, resize
from mlvgm.stylegan2 import EqualLinear


class FoldedUnit(nn.Module):
    """A residual unit whose second and third batch norms are folded into convolutions.

    The first one stays: the convolution after it pads with zeros, which the norm does not shift.
    """

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        norm, conv_1, slope, conv_2, norm_2, self.gate = unit.res_layer
        self.branch = nn.Sequential(norm, conv_1, slope, conv_then_norm(conv_2, norm_2))
        self.shortcut: nn.Module
        if isinstance(unit.shortcut_layer, nn.Sequential):
            self.shortcut = conv_then_norm(*unit.shortcut_layer)
        else:
            subsampling = cast(nn.MaxPool2d, unit.shortcut_layer)
            self.shortcut = nn.Identity() if subsampling.stride == 1 else subsampling

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.branch(x)) + self.shortcut(x)


class FoldedPyramid(nn.Module):
    """images (B, 3, H, W) in [-1, 1] -> maps (B, d, ., .) at 1/16, 1/8 and 1/4 of their size."""

    def __init__(self, source: Pyramid) -> None:
        super().__init__()
        conv, norm, slope = source.input_layer
        units = [FoldedUnit(cast(Unit, unit)) for unit in source.body]
        ends = [sum(STAGES[:i]) for i in (2, 3, 4)]
        self.fine = nn.Sequential(conv_then_norm(conv, norm), slope, *units[: ends[0]])
        self.medium = nn.Sequential(*units[ends[0] : ends[1]])
        self.coarse = nn.Sequential(*units[ends[1] :])
        self.lateral_medium, self.lateral_fine = source.latlayer1, source.latlayer2

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.fine(images)
        medium = self.medium(fine)
        coarse: Tensor = self.coarse(medium)
        medium = enlarge_to(coarse, medium) + self.lateral_medium(medium)
        return coarse, medium, enlarge_to(medium, fine) + self.lateral_fine(fine)


class E4eEncoder(nn.Module):
    """images (B, 3, 256, 256) in [-1, 1] -> codes (B, n, d)."""

    def __init__(self, purifier: E4ePurifier) -> None:
        super().__init__()
        encoder, mean = cast(Encoder4Editing, purifier.encoder), purifier.latent_avg
        self.pyramid = FoldedPyramid(encoder)
        # Row 0, with its row of the mean code, is added to all other rows.
        shifts = [mean[0], *(mean[1:] - mean[0])]
        self.heads = nn.ModuleList(
            folded_head(cast(StyleHead, head), shift) for head, shift in zip(encoder.styles, shifts, strict=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        coarse, medium, fine = self.pyramid(images)
        rows = [head(coarse) for head in self.heads[:COARSE]]
        rows += [head(medium) for head in self.heads[COARSE:MIDDLE]]
        rows += [head(fine) for head in self.heads[MIDDLE:]]
        base = rows[0][:, None]
        return torch.cat([base, base + torch.stack(rows[1:], dim=1)], dim=1)


class TransformerEncoder(nn.Module):
    """images (B, 3, 128, 128) in [-1, 1] -> codes (B, n, d)."""

    queries: Tensor
    mean: Tensor

    def __init__(self, purifier: StyleTransformerPurifier) -> None:
        super().__init__()
        encoder = purifier.encoder
        self.pyramid = FoldedPyramid(encoder)
        layers = (encoder.transformerlayer_coarse, encoder.transformerlayer_medium, encoder.transformerlayer_fine)
        self.cross_attentions = nn.ModuleList(CrossAttention(layer) for layer in layers)
        self.self_attentions = nn.ModuleList(SelfAttention(layer) for layer in layers[1:])
        with torch.no_grad():
            self.register_buffer("queries", SelfAttention(layers[0])(purifier.decoder.map(encoder.z)))
        self.register_buffer("mean", purifier.latent_avg)

    def forward(self, images: Tensor) -> Tensor:
        coarse, medium, fine = self.pyramid(resize(images, CANVAS)[:, :, BAND:-BAND])
        codes: Tensor = self.cross_attentions[0](self.queries, coarse)
        codes = self.cross_attentions[1](self.self_attentions[0](codes), medium)
        codes = self.cross_attentions[2](self.self_attentions[1](codes), fine)
        return codes + self.mean


class SelfAttention(nn.Module):
    """Self-attention of the queries, residual and norm: (B, n, d) -> (B, n, d)."""

    def __init__(self, layer: QueryLayer) -> None:
        super().__init__()
        attention = layer.self_attn
        self.project = linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out, self.norm = linear(attention.out_proj.weight, attention.out_proj.bias), layer.norm1

    def forward(self, queries: Tensor) -> Tensor:
        _, n, d = queries.shape
        q, k, v = self.project(queries).view(-1, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), dim=-1)
        mixed = self.out((weights @ v).transpose(1, 2).flatten(2))
        return self.norm(queries + mixed)


class CrossAttention(nn.Module):
    """Attention of the queries (B, n, d) to a map (B, d, H, W), then the feed-forward part: -> (B, n, d)."""

    def __init__(self, layer: QueryLayer) -> None:
        super().__init__()
        attention, d = layer.multihead_attn, layer.linear1.in_features
        weight, bias = attention.in_proj_weight.double(), attention.in_proj_bias.double()
        q, k, v = weight.view(3, HEADS, -1, d)
        q_bias, _, v_bias = bias.chunk(3)
        out = attention.out_proj.weight.double()
        temperature = math.sqrt(d / HEADS)
        self.q_proj = linear(
            torch.einsum("hij,hik->hkj", q, k).flatten(0, 1) / temperature,
            torch.einsum("hi,hik->hk", q_bias.view(HEADS, -1), k).flatten() / temperature,
        )
        self.out_proj = linear(
            torch.einsum("ohi,hij->ohj", out.view(d, HEADS, -1), v).flatten(1),
            out @ v_bias + attention.out_proj.bias,
        )
        self.norm_1, self.norm_2 = layer.norm2, layer.norm3
        self.feed = nn.Sequential(layer.linear1, nn.ReLU(), layer.linear2)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        pixels, (n, d) = features.flatten(2), queries.shape[1:]
        asked = self.q_proj(queries).view(-1, n * HEADS, d)
        weights = torch.softmax(asked @ pixels, dim=-1)
        seen = (weights @ pixels.transpose(1, 2)).view(-1, n, HEADS * d)
        queries = self.norm_1(queries + self.out_proj(seen))
        return self.norm_2(queries + self.feed(queries))


def folded_head(head: StyleHead, shift: Tensor) -> nn.Sequential:
    """``head`` with the constant ``shift`` added to its code."""
    last = plain_linear(head.linear)
    return nn.Sequential(*head.convs, nn.Flatten(1), linear(last.weight, last.bias + shift))


def plain_linear(layer: EqualLinear, gain: float = 1.0) -> nn.Linear:
    """The linear part of ``layer``, times ``gain``, without run-time scaling."""
    return linear(layer.weight * (layer.scale * gain), layer.bias * (layer.lr_mul * gain))
