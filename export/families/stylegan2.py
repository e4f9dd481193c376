"""Both StyleGAN2 families rewritten for export: the same numbers as `mlvgm.stylegan2` with less work.

- Modulated convolutions have static weights: the style scales their input channels, and the demodulation, one small
  matrix product, scales their output channels. Equalised learning rates, activation gains and noise strengths are
  folded into the weights.
- ToRGB layers scale the feature map and convolve it. A matrix product with per-sample weights would save the scaled
  copy, but runtimes with a channels-last layout would have to transpose the whole feature map.
- The published image is pooled at the end. Everything after the last activation is linear, so the last feature map is
  pooled instead, and one filter takes the skip image to its final size.
- Style Transformer keeps only a band of rows. Rows that no kept pixel depends on are not computed.
- The mapping network runs once for all latents of all samples.

An upsampling convolution stays a transposed 3x3 convolution followed by a depthwise filter. As one 6x6 convolution,
transposed or split by phases, it has four times the multiplications and is 2 to 4 times slower in both CPU runtimes.

Blocks before the first resampled latent are not run once for all samples, as `export.families.nvae` does: every
schedule of the StyleGAN2 recipes resamples the first latent. And there is little to save: at 1024 px, the blocks that
depend on the first 8 of the 18 latents alone have 5 % of the decoder's multiplications, on the first 10 of them 21 %.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.families.stylegan2_encoders import E4eEncoder, TransformerEncoder, plain_linear
from export.stage import Stage
from handlers.manifest import TensorSpec
from mlvgm.e4e import E4ePurifier
from mlvgm.style_transformer import BAND, CANVAS, StyleTransformerPurifier
from mlvgm.stylegan2 import EPSILON, EqualLinear, StyledConv, StyleGan2Purifier, ToRGB

GAIN = math.sqrt(2)
"""Gain of each activation. Leaky ReLU commutes with positive factors, so the gain is folded into what comes before."""


def stages(purifier: StyleGan2Purifier) -> tuple[Stage, ...]:
    """``encode``, ``resample`` and ``decode`` of an e4e or Style Transformer purifier."""
    side, n, d = purifier.image_size, purifier.n_latents, purifier.decoder.style_dim
    images, alphas = TensorSpec("images", ("B", 3, side, side)), TensorSpec("alphas", (n,))
    codes, noise, mixed = (TensorSpec(name, ("B", n, d)) for name in ("codes", "noise", "mixed"))
    return (
        Stage("encode", lambda: Encode(purifier), lambda x: purifier.encode(x)[0], (images,), (codes,)),
        Stage("resample", lambda: Resample(purifier), purifier.resample, (codes, noise, alphas), (mixed,)),
        Stage("decode", lambda: Decode(purifier), purifier.decode, (mixed,), (images,)),
    )


class Encode(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> codes (B, n, d)."""

    def __init__(self, purifier: StyleGan2Purifier) -> None:
        super().__init__()
        self.encoder: nn.Module
        if isinstance(purifier, E4ePurifier):
            self.encoder = E4eEncoder(purifier)
        elif isinstance(purifier, StyleTransformerPurifier):
            self.encoder = TransformerEncoder(purifier)
        else:
            raise TypeError(f"{type(purifier).__name__} is not a StyleGAN2 purifier that can be rewritten")

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(2.0 * images - 1.0)


class Resample(nn.Module):
    """codes (B, n, d), noise (B, n, d), alphas (n,) -> mixed (B, n, d)."""

    def __init__(self, purifier: StyleGan2Purifier) -> None:
        super().__init__()
        # To scale z by c before it is normalised is to divide the epsilon by c^2.
        self.epsilon = EPSILON / purifier.noise_scale**2
        mapping = [layer for layer in purifier.decoder.style if isinstance(layer, EqualLinear)]
        self.layers = nn.ModuleList(plain_linear(layer, GAIN) for layer in mapping)

    def forward(self, codes: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
        w = noise * torch.rsqrt(noise.square().mean(dim=-1, keepdim=True) + self.epsilon)
        for layer in self.layers:
            w = F.leaky_relu(layer(w), 0.2)
        weights = alphas[:, None]
        return (1.0 - weights) * codes + weights * w


def depthwise(x: Tensor, taps: Tensor) -> Tensor:
    """x (B, C, H, W) with one row and column of zeros around it, filtered by taps (C, 1, 4, 4)."""
    return F.conv2d(x, taps, padding=1, groups=len(taps))


def shifted(taps: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """`depthwise` with these ``taps``, as weighted sums of shifted maps: along the columns, then along the rows.

    A compiler makes one pass of it, together with what comes before and after. The depthwise convolution is a kernel of
    its own on a GPU, and a very slow one with channels last.
    """
    kernel = taps[0, 0].double()
    column, row = kernel.sum(1) / kernel.sum(), kernel.sum(0)
    if not torch.allclose(torch.outer(column, row), kernel, atol=1e-9):
        return depthwise  # it is no sum along rows of sums along columns
    down, across = column.tolist(), row.tolist()  # numbers: from tensors, a compiler could not read them

    def smooth(x: Tensor, _: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1))
        height, width = x.shape[2] - len(down) + 1, x.shape[3] - len(across) + 1
        x = sum(weight * x[:, :, i : i + height] for i, weight in enumerate(down))
        return sum(weight * x[..., i : i + width] for i, weight in enumerate(across))

    return smooth


class StaticConv(nn.Module):
    """A styled convolution: x (B, in, H, W), style (B, d) -> (B, out, H, W) or, upsampling, (B, out, 2H, 2W)."""

    smooth: Callable[[Tensor, Tensor], Tensor] = staticmethod(depthwise)
    weight: Tensor
    squares: Tensor
    bias: Tensor
    noise: Tensor
    blur: Tensor

    def __init__(self, layer: StyledConv, noise: Tensor) -> None:
        super().__init__()
        conv = layer.conv
        self.upsample, self.modulation = conv.upsample, plain_linear(conv.modulation)
        weight = conv.weight[0] * conv.scale
        self.register_buffer("squares", weight.square().sum(dim=(2, 3)).T.contiguous())
        self.register_buffer("bias", GAIN * layer.activate.bias)
        self.register_buffer("noise", GAIN * layer.noise.weight * noise)
        if conv.upsample:
            weight = weight.transpose(0, 1)
            taps = conv.blur.kernel.flip(0, 1)
            self.register_buffer("blur", taps.expand(conv.weight.shape[1], 1, -1, -1).contiguous())
        self.register_buffer("weight", weight.contiguous())

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, norm = (factor.to(x.dtype)[:, :, None, None] for factor in self.factors(style))
        x = x * scale
        if self.upsample:
            x = F.conv_transpose2d(x, self.weight, stride=2)
            x = self.smooth(x, self.blur)
        else:
            x = F.conv2d(x, self.weight, padding=1)
        # All element-wise operations in one expression: runtimes fuse them into one pass over the feature map.
        return F.leaky_relu(x * norm + self.bias[:, None, None] + self.noise, 0.2)

    def factors(self, style: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the input channels (B, in) and of the output channels (B, out)."""
        scale = self.modulation(style)
        return scale, GAIN * torch.rsqrt(scale.square() @ self.squares + EPSILON)


class StaticToRGB(nn.Module):
    """A ToRGB layer without the skip: x (B, in, H, W), style (B, d) -> (B, 3, H, W), times ``gain``, plus ``shift``."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: ToRGB, gain: float, shift: float) -> None:
        super().__init__()
        self.modulation = plain_linear(layer.conv.modulation)
        self.register_buffer("weight", layer.conv.weight[0] * (layer.conv.scale * gain))
        self.register_buffer("bias", layer.bias * gain + shift)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        image: Tensor = F.conv2d(x * self.modulation(style)[:, :, None, None], self.weight)
        return image + self.bias


class SkipUpsample(nn.Module):
    """Upsamples the skip image by 2 and pools it by ``pool``, in one filter: (B, 3, H, W) -> side 2H / ``pool``.

    Zero insertion, the 4x4 filter and the mean of ``pool`` x ``pool`` pixels are one filter of ``pool / 2 + 2`` taps.
    """

    taps: Tensor

    def __init__(self, kernel: Tensor, pool: int) -> None:
        super().__init__()
        self.pool = pool
        if pool > 1:
            margin = pool - 1
            kernel = F.pad(kernel[None, None], (margin,) * 4)
            kernel = F.avg_pool2d(kernel, pool, stride=2)[0, 0].flip(0, 1)
        self.register_buffer("taps", kernel.expand(3, 1, -1, -1).contiguous())

    def forward(self, image: Tensor) -> Tensor:
        if self.pool > 1:
            return F.conv2d(image, self.taps, stride=self.pool // 2, padding=1, groups=3)
        return F.conv_transpose2d(image, self.taps, stride=2, padding=1, groups=3)


class Block(nn.Module):
    """One resolution: features and image (B, ., H, W) and three rows of the code -> both at twice the size.

    The last block has ``pool`` > 1 and returns the image at the pooled size. The first and the last ``crop`` rows of
    the inputs are left out.
    """

    def __init__(
        self, up: StaticConv, conv: StaticConv, layer: ToRGB, to_rgb: StaticToRGB, pool: int = 1, crop: int = 0
    ) -> None:
        super().__init__()
        self.up, self.conv, self.pool, self.crop = up, conv, pool, crop
        self.to_rgb, self.upsample_skip = to_rgb, SkipUpsample(layer.upsample.kernel, pool)

    def forward(self, x: Tensor, image: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(self.up(trim(x, self.crop), codes[:, 0]), codes[:, 1])
        seen = F.avg_pool2d(x, self.pool) if self.pool > 1 else x
        return x, self.to_rgb(seen, codes[:, 2]) + self.upsample_skip(trim(image, self.crop))


def trim(images: Tensor, rows: int) -> Tensor:
    """``images`` (B, C, H, W) without the first and the last ``rows`` rows."""
    return images[:, :, rows:-rows] if rows else images


class Decode(nn.Module):
    """mixed (B, n, d) -> images (B, 3, H, W), nominally in [0, 1]."""

    start: Tensor

    def __init__(self, purifier: StyleGan2Purifier) -> None:
        super().__init__()
        generator, side = purifier.decoder, purifier.image_size
        pool, self.repeat = max(generator.size // side, 1), max(side // generator.size, 1)
        self.band = BAND * side // CANVAS if isinstance(purifier, StyleTransformerPurifier) else 0
        noise = generator.noises.images()
        self.register_buffer("start", generator.input.input)
        self.first = StaticConv(generator.conv1, noise[0])
        self.first_to_rgb = StaticToRGB(generator.to_rgb1, gain=0.5, shift=0.0)

        self.blocks, last, row = nn.ModuleList(), len(generator.to_rgbs) - 1, 0
        for i, start in enumerate(first_rows(generator.size, self.band * pool // self.repeat, pool)):
            crop, row = start - row, 2 * start
            up, conv = (
                StaticConv(cast(StyledConv, generator.convs[k]), trim(noise[k + 1], row)) for k in (2 * i, 2 * i + 1)
            )
            layer = cast(ToRGB, generator.to_rgbs[i])
            # Images go from [-1, 1] to [0, 1] by halved weights, and a shift in the last bias.
            to_rgb = StaticToRGB(layer, gain=0.5, shift=0.5 if i == last else 0.0)
            self.blocks.append(Block(up, conv, layer, to_rgb, pool if i == last else 1, crop))
        self.crop = self.band - row // pool * self.repeat

    def forward(self, mixed: Tensor) -> Tensor:
        x = self.first(self.start, mixed[:, 0])
        image: Tensor = self.first_to_rgb(x, mixed[:, 1])
        for i, block in enumerate(self.blocks):
            x, image = block(x, image, mixed[:, 2 * i + 1 : 2 * i + 4])
        if self.repeat > 1:
            image = F.interpolate(image, scale_factor=float(self.repeat), mode="nearest")
        return F.pad(trim(image, self.crop), (0, 0, self.band, self.band)) if self.band else image


def first_rows(size: int, band: int, pool: int) -> list[int]:
    """The first input row that each block needs if the outer ``band`` rows of the image are discarded.

    Output row r depends on input rows from r / 2 - 2 on: one for the 3x3 convolution, the rest for the filter.
    """
    rows: list[int] = []
    row = band
    for _ in range(size.bit_length() - 3):
        row = max(row // 2 - 2, 0)
        if not rows:
            row -= row % max(pool // 2, 1)  # whole windows of the pooling
        rows.append(row)
    return rows[::-1]
