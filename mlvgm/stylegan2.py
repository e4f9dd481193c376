"""StyleGAN2 generator (Karras et al., CVPR 2020), laid out as in the rosinality-style checkpoints, and its purifier.

The operators are the published ones, sample by sample: modulated weights in a grouped convolution, resampling by zero
insertion and a 4x4 filter. `export/families/stylegan2.py` has the form that is fast.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlvgm.checkpoint import CheckpointError, entry, load_tensors, read_option, width
from mlvgm.purifier import Purified, Purifier

EPSILON = 1e-8
MAPPING_LAYERS = 8
PUBLISHED_CHANNELS = (512, 512, 512, 512, 512, 256, 128, 64, 32)  # at 4, 8, ..., 1024 pixels
STYLE_DIM = 512


def upfirdn(images: Tensor, kernel: Tensor, up: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Zero-insertion by ``up``, zero padding, then convolution of every channel with ``kernel``.

    Args:
        images: (B, C, H, W).
        kernel: (kh, kw), applied as a true convolution, that is flipped.
        up: factor in both directions; the zeros come after each pixel.
        pad: pixels of zero padding before and after, in both directions.

    Returns:
        (B, C, up * H + sum(pad) - kh + 1, up * W + sum(pad) - kw + 1).
    """
    batch, channels, height, width = images.shape
    planes = images.reshape(batch * channels, 1, height, 1, width, 1)
    planes = F.pad(planes, (0, up - 1, 0, 0, 0, up - 1)).reshape(batch * channels, 1, height * up, width * up)
    planes = F.conv2d(F.pad(planes, (*pad, *pad)), kernel.flip(0, 1)[None, None])
    return planes.reshape(batch, channels, *planes.shape[2:])


class PixelNorm(nn.Module):
    """Scales each row of (B, d) to unit mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + EPSILON)


class EqualLinear(nn.Module):
    """Linear layer with an equalised learning rate, (..., in) to (..., out), with or without the scaled leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, lr_mul: float = 1.0, activate: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_mul)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale, self.lr_mul, self.activate = lr_mul / math.sqrt(inputs), lr_mul, activate

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight * self.scale, self.bias * self.lr_mul)
        return scaled_leaky_relu(x) if self.activate else x


def scaled_leaky_relu(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2 whose gain sqrt(2) keeps the variance."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class Resample(nn.Module):
    """The 4x4 low-pass filter, a buffer of the checkpoint with the gain 4 that zero insertion needs."""

    kernel: Tensor

    def __init__(self, up: int, pad: tuple[int, int]) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(row, row) / 16.0)
        self.up, self.pad = up, pad

    def forward(self, images: Tensor) -> Tensor:
        return upfirdn(images, self.kernel, self.up, self.pad)


class ModulatedConv(nn.Module):
    """Convolution whose weights are scaled per sample and input channel by an affine map of the style (section 2.2).

    ``forward`` takes (B, in, H, W) and a style (B, d), and gives (B, out, H, W), or twice that size with ``upsample``.
    """

    def __init__(
        self, inputs: int, outputs: int, size: int, style_dim: int, demodulate: bool = True, upsample: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, size, size))
        self.modulation = EqualLinear(style_dim, inputs)
        if upsample:
            self.blur = Resample(up=1, pad=(1, 1))
        self.scale, self.demodulate, self.upsample = 1 / math.sqrt(inputs * size * size), demodulate, upsample

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        batch, inputs, height, width = x.shape
        weight = self.scale * self.weight * self.modulation(style).view(batch, 1, inputs, 1, 1)
        if self.demodulate:
            norm = torch.rsqrt(weight.square().sum(dim=(2, 3, 4), keepdim=True) + EPSILON)
            weight = weight * norm
        x = x.reshape(1, batch * inputs, height, width)
        if self.upsample:
            x = F.conv_transpose2d(x, weight.transpose(1, 2).flatten(0, 1), stride=2, groups=batch)
            return self.blur(x.view(batch, -1, *x.shape[2:]))
        x = F.conv2d(x, weight.flatten(0, 1), padding=weight.shape[-1] // 2, groups=batch)
        return x.view(batch, -1, height, width)


class NoiseInjection(nn.Module):
    """Adds a noise image (1, 1, H, W), times a learnt strength, to every channel and sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return x + self.weight * noise


class BiasedActivation(nn.Module):
    """Bias per channel, then the scaled leaky ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return scaled_leaky_relu(x + self.bias.view(1, -1, 1, 1))


class StyledConv(nn.Module):
    """3x3 modulated convolution, noise, bias and activation."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, upsample: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, outputs, 3, style_dim, upsample=upsample)
        self.noise = NoiseInjection()
        self.activate = BiasedActivation(outputs)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        return self.activate(self.noise(self.conv(x, style), noise))


class ToRGB(nn.Module):
    """1x1 modulated convolution to RGB, added to the doubled image of the resolution below (if there is one)."""

    def __init__(self, inputs: int, style_dim: int, upsample: bool = True) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        if upsample:
            self.upsample = Resample(up=2, pad=(2, 1))

    def forward(self, x: Tensor, style: Tensor, skip: Tensor | None = None) -> Tensor:
        image: Tensor = self.conv(x, style) + self.bias
        return image if skip is None else image + self.upsample(skip)


class ConstantInput(nn.Module):
    """The learnt 4x4 feature map that every image starts from: ``forward`` repeats it for each row of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.input.expand(len(x), -1, -1, -1)


class StoredNoise(nn.Module):
    """The fixed noise images ``noise_0``, ``noise_1``, ...: one for each styled convolution."""

    def __init__(self, resolutions: Sequence[int]) -> None:
        super().__init__()
        for i, side in enumerate(resolutions):
            self.register_buffer(f"noise_{i}", torch.randn(1, 1, side, side))

    def images(self) -> list[Tensor]:
        """All of them, coarse to fine, (1, 1, H, W) each."""
        return list(self.buffers())


class Generator(nn.Module):
    """Mapping network ``style`` and synthesis network of StyleGAN2 with skip connections ("config F").

    Args:
        channels: width of the feature maps at 4, 8, 16, ... pixels; their count gives the image size.
        style_dim: width of z and w.

    Attributes:
        size: side of the images.
        n_latents: rows of a W+ code, ``2 * log2(size) - 2``.
    """

    def __init__(self, channels: Sequence[int], style_dim: int = STYLE_DIM) -> None:
        super().__init__()
        self.size, self.n_latents, self.style_dim = 4 * 2 ** (len(channels) - 1), 2 * len(channels), style_dim
        layers = [EqualLinear(style_dim, style_dim, lr_mul=0.01, activate=True) for _ in range(MAPPING_LAYERS)]
        self.style = nn.Sequential(PixelNorm(), *layers)
        self.input = ConstantInput(channels[0])
        self.conv1 = StyledConv(channels[0], channels[0], style_dim)
        self.to_rgb1 = ToRGB(channels[0], style_dim, upsample=False)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for inputs, outputs in pairwise(channels):
            self.convs.append(StyledConv(inputs, outputs, style_dim, upsample=True))
            self.convs.append(StyledConv(outputs, outputs, style_dim))
            self.to_rgbs.append(ToRGB(outputs, style_dim))
        self.noises = StoredNoise([4, *(4 * 2**i for i in range(1, len(channels)) for _ in range(2))])

    def map(self, z: Tensor) -> Tensor:
        """Mapping network on (..., d), row by row, without truncation."""
        w: Tensor = self.style(z.reshape(-1, self.style_dim))
        return w.view(z.shape)

    def forward(self, codes: Tensor) -> Tensor:
        """Images (B, 3, size, size), nominally in [-1, 1] and not clamped, of W+ codes (B, n_latents, d)."""
        noise = self.noises.images()
        x = self.conv1(self.input(codes), codes[:, 0], noise[0])
        image: Tensor = self.to_rgb1(x, codes[:, 1])
        # The ToRGB layer of one resolution and the first convolution of the next share a row of the code.
        for i, to_rgb in enumerate(self.to_rgbs):
            row = 2 * i + 1
            x = self.convs[2 * i](x, codes[:, row], noise[row])
            x = self.convs[2 * i + 1](x, codes[:, row + 1], noise[row + 1])
            image = to_rgb(x, codes[:, row + 2], image)
        return image


class StyleGan2Purifier(Purifier):
    """Base class of both StyleGAN2 families: the mapping network is the prior, W+ is the latent space.

    Attributes:
        encoder: images in [-1, 1] to offsets from ``latent_avg``, (B, n, d).
        latent_avg: (n, d), zero when the encoder was not trained around the mean.
        noise_scale: standard deviation of z before the mapping network.
    """

    encoder: nn.Module
    latent_avg: Tensor
    noise_scale = 1.0

    def __init__(self, encoder: nn.Module, decoder: Generator, latent_avg: Tensor) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("latent_avg", latent_avg)
        self.noise_shapes = ((decoder.style_dim,),) * decoder.n_latents

    def resample(self, codes: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
        """Interpolate ``codes`` (B, n, d) with fresh codes from ``noise`` (B, n, d), weights ``alphas`` (n,)."""
        weights = alphas.view(1, -1, 1)
        return (1 - weights) * codes + weights * self.decoder.map(noise * self.noise_scale)

    def decode(self, mixed: Tensor) -> Tensor:
        """Images (B, 3, H, W), nominally in [0, 1] and not clamped, of ``mixed`` (B, n, d)."""
        raise NotImplementedError

    def generate(self, encoded: tuple[Tensor, ...], noise: Sequence[Tensor], alphas: Tensor) -> Purified:
        (codes,) = encoded
        mixed = self.resample(codes, torch.stack(tuple(noise), dim=1), alphas)
        return Purified(self.decode(mixed), codes.unbind(dim=1), mixed.unbind(dim=1))


def generator_like(tensors: Mapping[str, Any], prefix: str, size: int, path: str | Path) -> Generator:
    """A generator of ``size`` with the widths found in ``tensors`` (its weights are not loaded)."""
    style_dim = width(tensors, f"{prefix}style.1.weight", 1, STYLE_DIM, path)
    channels = [width(tensors, f"{prefix}input.input", 1, PUBLISHED_CHANNELS[0], path)]
    for i, published in enumerate(PUBLISHED_CHANNELS[1 : size.bit_length() - 2]):
        channels.append(width(tensors, f"{prefix}convs.{2 * i}.conv.weight", 1, published, path))
    return Generator(channels, style_dim)


def read_size(opts: Mapping[str, Any], key: str, path: str | Path, default: int | None = None) -> int:
    """The generator's size: a power of two that the published family covers."""
    size: int = read_option(opts, key, int, path, default)
    if not (8 <= size <= 1024 and size.bit_count() == 1):
        raise CheckpointError(f"{path}: option {key!r} should be a power of two from 8 to 1024, not {size}")
    return size


def read_latent_avg(
    checkpoint: Mapping[str, Any], opts: Mapping[str, Any], shape: tuple[int, int], path: str | Path
) -> Tensor:
    """The mean code that the encoder's output is added to, as (n, d): zero if ``start_from_latent_avg`` is off.

    The code accepts (d,) and (1, d) as well, which some files hold: the published code broadcasts them.
    """
    if not read_option(opts, "start_from_latent_avg", bool, path):
        return torch.zeros(shape)
    value, found = entry(checkpoint, "latent_avg", path), nn.Module()
    one_for_all = isinstance(value, Tensor) and value.shape in (shape[1:], (1, shape[1]))
    found.register_buffer("latent_avg", torch.zeros(value.shape if one_for_all else shape))
    load_tensors(found, {"latent_avg": value}, path)
    return torch.as_tensor(found.latent_avg).expand(shape).clone()
