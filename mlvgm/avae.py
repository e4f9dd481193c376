"""A-VAE (ECCV 2020): a VAE whose decoder is a StyleGAN generator, a purifier that the paper compares with.

The encoder sees 32x32 pixels; the generator (Karras et al., CVPR 2019, section 2) draws the image from a constant,
the style that the latent gives, and a skip connection at 16x16. Names follow the published checkpoints.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlvgm.checkpoint import CheckpointError, find_weights, load_tensors, read_checkpoint, width
from mlvgm.purifier import Autoencoder, Purified
from mlvgm.stylegan2 import ConstantInput, PixelNorm

ENCODER_SIZE = 32
TEMPERATURE = 0.6
PUBLISHED_CHANNELS = 512
CONSTANT = "generator.progression.0.conv1.input"


class Equalised(nn.Module):
    """Linear layer, or convolution that keeps the size, with an equalised learning rate.

    Its weights are scaled by sqrt(2 / fan-in) at each call (Karras et al., ICLR 2018, section 4.1).
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight_orig = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_orig * math.sqrt(2 / self.weight_orig[0].numel())
        if weight.ndim == 2:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)


def equal_conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Module:
    return nn.Sequential(OrderedDict(conv=Equalised(outputs, inputs, kernel, kernel)))


def equal_linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(OrderedDict(linear=Equalised(outputs, inputs)))


def encoder_block(inputs: int, outputs: int) -> nn.Module:
    """Two convolutions; then every other pixel, (B, in, H, W) to (B, out, H/2, W/2). It has no normalisation."""
    layers = OrderedDict[str, nn.Module](conv1=equal_conv(inputs, outputs), act1=nn.LeakyReLU(0.2))
    layers |= OrderedDict(conv2=equal_conv(outputs, outputs), halve=nn.Upsample(scale_factor=0.5))
    layers["act2"] = nn.LeakyReLU(0.2)
    return nn.Sequential(layers)


class Blur(nn.Module):
    """3x3 binomial filter of each channel, as the buffer of the checkpoint has it; its mirror image serves training."""

    weight: Tensor
    weight_flip: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        taps = (torch.outer(row, row) / 16).expand(channels, 1, 3, 3)
        self.register_buffer("weight", taps.clone())
        self.register_buffer("weight_flip", taps.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1, groups=x.shape[1])


class FusedUpsample(nn.Module):
    """Doubling and a 3x3 convolution as one: a transposed convolution with the mean of four shifted kernels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.weight * math.sqrt(2 / (9 * self.weight.shape[0]))
        kernel = F.avg_pool2d(F.pad(scaled, (1, 1, 1, 1)), 2, stride=1)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class NoiseInjection(nn.Module):
    """Adds noise (B, 1, H, W) to each channel, times its learnt strength."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight_orig = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return x + self.weight_orig * math.sqrt(2 / x.shape[1]) * noise


class AdaIN(nn.Module):
    """Each channel normalised over its pixels, then scaled and shifted as the style (B, d) says."""

    def __init__(self, channels: int, style_dim: int) -> None:
        super().__init__()
        self.style = equal_linear(style_dim, 2 * channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.style(style)[:, :, None, None].chunk(2, dim=1)
        return scale * F.instance_norm(x) + shift


class GeneratorBlock(nn.Module):
    """One resolution of the generator: ``forward`` takes the features before it, the style and the noise (B, 1, h, w).

    Both of its layers add the same noise.
    """

    def __init__(self, enlarge: nn.Module, channels: int, style_dim: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = enlarge, equal_conv(channels, channels)
        self.noise1, self.noise2 = NoiseInjection(channels), NoiseInjection(channels)
        self.adain1, self.adain2 = AdaIN(channels, style_dim), AdaIN(channels, style_dim)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        x = self.adain1(F.leaky_relu(self.noise1(self.conv1(x), noise), 0.2), style)
        return self.adain2(F.leaky_relu(self.noise2(self.conv2(x), noise), 0.2), style)


class AVAE(Autoencoder):
    """A-VAE as a purifier.

    Args:
        image_size: side of the images in pixels, a power of two of at least 32.
        channels: of the latent, the style and the coarse layers; all other widths follow (published: 512).

    The noise is one (1, s, s) tensor for each resolution s = 4, 8, ..., ``image_size``, then (channels, 4, 4) for the
    latent.
    """

    def __init__(self, image_size: int, channels: int = PUBLISHED_CHANNELS) -> None:
        super().__init__()
        sizes = [4 << i for i in range(int(math.log2(image_size)) - 1)]
        self.image_size = image_size
        self.noise_shapes = (*((1, size, size) for size in sizes), (channels, 4, 4))
        half = channels // 2
        self.encoder = nn.ModuleDict(
            {
                "conv2": encoder_block(3, half),
                "conv3": encoder_block(half, channels),
                "conv4": encoder_block(channels, 2 * channels),
            }
        )
        layers: list[nn.Module] = [PixelNorm()]
        for inputs in (16 * channels, channels, channels, channels):
            layers += [equal_linear(inputs, channels), nn.LeakyReLU(0.2)]
        self.style = nn.Sequential(*layers)
        blocks = [GeneratorBlock(ConstantInput(channels), channels, channels)]
        before = channels
        for size in sizes[1:]:
            after = channels if size <= 16 else channels // 4 if size == image_size else half
            if size <= 16:
                enlarge = nn.Sequential(nn.Upsample(scale_factor=2), equal_conv(before, after), Blur(after))
            else:
                enlarge = nn.Sequential(FusedUpsample(before, after), Blur(after))
            blocks.append(GeneratorBlock(enlarge, after, channels))
            before = after + half if size == 16 else after  # the skip connection joins after 16x16
        self.generator = nn.ModuleDict({"progression": nn.ModuleList(blocks), "to_rgb": equal_conv(before, 3, 1)})

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Skip features (B, c/2, 16, 16), mean and log variance (B, c, 4, 4) of ``images`` (B, 3, H, W) in [0, 1]."""
        small = F.avg_pool2d(2 * images - 1, self.image_size // ENCODER_SIZE)
        skip = self.encoder["conv2"](small)
        mean, log_variance = self.encoder["conv4"](self.encoder["conv3"](skip)).chunk(2, dim=1)
        return skip, mean, log_variance

    def reconstruct(self, images: Tensor, noise: Sequence[Tensor]) -> Purified:
        skip, mean, log_variance = self.encode(images)
        latent = mean + TEMPERATURE * torch.exp(0.5 * log_variance) * noise[-1]
        style = self.style(latent.flatten(1))
        x = latent
        for block, layer_noise in zip(self.generator["progression"], noise[:-1], strict=True):  # type: ignore[call-overload]
            x = block(x, style, layer_noise)
            if x.shape[-1] == 16:
                x = torch.cat((x, skip), dim=1)
        return Purified((self.generator["to_rgb"](x) + 1) / 2, (mean,), (latent,))


def read_avae(path: str | Path, image_size: int) -> AVAE:
    """The purifier of an A-VAE checkpoint, a bare state dict of the generator whose weights were averaged.

    Its width comes from the file, so narrower models load as well.

    Args:
        image_size: side of its images in pixels: 64, 128 or 256 as published; a power of two of at least 32.

    Raises:
        CheckpointError: naming the file and the first key that is missing or wrong.
    """
    tensors = find_weights(read_checkpoint(path), CONSTANT, path)
    if image_size < ENCODER_SIZE or image_size.bit_count() > 1:
        raise CheckpointError(f"{path}: image_size must be a power of two of at least {ENCODER_SIZE}, not {image_size}")
    blocks = sum(f"generator.progression.{i}.conv2.conv.bias" in tensors for i in range(16))
    if 2 << blocks != image_size:
        drawn = f"{blocks} resolutions, for {2 << blocks} pixels"
        raise CheckpointError(f"{path}: 'generator.progression' has {drawn}, not for image_size={image_size}")
    with torch.device("meta"):  # the file's own tensors take the place of these
        purifier = AVAE(image_size, width(tensors, CONSTANT, 1, PUBLISHED_CHANNELS, path))
    load_tensors(purifier, tensors, path)
    return purifier.eval().requires_grad_(False)
