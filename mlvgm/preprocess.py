"""The two input transforms of the paper's variants: Gaussian blur and noise of a fixed L2 norm."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def blur_kernel_size(image_size: int) -> int:
    """Taps of the blur for a square image, as in the published code: 3, 15, 31, 255 for 32, 64, 128, 256 pixels.

    The published formula has a square root where a logarithm was meant; with sigma 1 the additional taps are about 0.
    """
    return 2 ** int(math.sqrt(image_size) // 2) - 1


def gaussian_taps(size: int) -> Tensor:
    """Normalised 1-D Gaussian with sigma 1, (size,)."""
    x = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    taps = torch.exp(-(x**2) / 2)
    return taps / taps.sum()


def blur_images(images: Tensor, taps: Tensor | None = None) -> Tensor:
    """Separable Gaussian blur of (B, 3, H, W) with sigma 1 and reflected borders."""
    if taps is None:
        taps = gaussian_taps(blur_kernel_size(images.shape[-2]))
    taps = taps.to(images)
    channels, pad = images.shape[1], (len(taps) - 1) // 2
    row = taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    images = F.conv2d(F.pad(images, (pad, pad, 0, 0), mode="reflect"), row, groups=channels)
    column = taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    return F.conv2d(F.pad(images, (0, 0, pad, pad), mode="reflect"), column, groups=channels)


def add_noise(images: Tensor, noise: Tensor, l2: float) -> Tensor:
    """Add ``noise`` (B, 3, H, W), scaled per image to the norm ``l2``, and clamp to [0, 1]."""
    norm = noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (images + l2 * noise / norm).clamp(0.0, 1.0)
