"""Building blocks of NVAE (Vahdat and Kautz, NeurIPS 2020, section 3): residual cells, samplers, flows.

Module and tensor names follow the published checkpoints, so a state dict loads as it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

BRANCH_SCALE = 0.1
"""Every residual branch is damped by this factor, which keeps deep towers stable (NVAE, section 3.2)."""


def soft_clamp(x: Tensor) -> Tensor:
    """Squash to (-5, 5) smoothly: means and log standard deviations pass through it."""
    return 5.0 * torch.tanh(x / 5.0)


def normed_conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    """A convolution under weight normalisation, padded to keep the size at stride 1."""
    return weight_norm(nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2))


class SqueezeExcite(nn.Module):
    """Gate the channels of (B, C, H, W) by their global means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.linear_1 = nn.Linear(channels, hidden)
        self.linear_2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.linear_2(torch.relu(self.linear_1(x.mean(dim=(2, 3))))))
        return x * gate[:, :, None, None]


class ConvSkip(nn.Module):
    """Skip connection of a cell that changes the resolution: bilinear upsampling, or SiLU and stride 2; then 1x1."""

    def __init__(self, inputs: int, outputs: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = normed_conv(inputs, outputs, 1, stride=1 if up else 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True))
        return self.conv(F.silu(x))


class ResidualCell(nn.Module):
    """``skip(x) + 0.1 * residual(x)``."""

    def __init__(self, residual: nn.Module, skip: nn.Module | None) -> None:
        super().__init__()
        self.skip_connection = nn.Identity() if skip is None else skip
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return self.skip_connection(x) + BRANCH_SCALE * self.residual(x)


def encoder_cell(inputs: int, outputs: int | None = None) -> ResidualCell:
    """Two batch-normed 3x3 convolutions and a gate. With ``outputs``, it also halves the resolution."""
    stride = 1 if outputs is None else 2
    width = inputs if outputs is None else outputs
    residual = nn.Sequential(
        nn.BatchNorm2d(inputs),
        nn.SiLU(),
        normed_conv(inputs, width, 3, stride=stride),
        nn.BatchNorm2d(width),
        nn.SiLU(),
        normed_conv(width, width, 3),
        SqueezeExcite(width),
    )
    return ResidualCell(residual, None if outputs is None else ConvSkip(inputs, width, up=False))


def decoder_cell(inputs: int, expansion: int, kernel: int, outputs: int | None = None) -> ResidualCell:
    """Inverted bottleneck around a depthwise convolution. With ``outputs``, it also doubles the resolution."""
    width, hidden = inputs if outputs is None else outputs, inputs * expansion
    layers: list[nn.Module] = [
        nn.BatchNorm2d(inputs),
        nn.Conv2d(inputs, hidden, 1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.SiLU(),
        nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False),
        nn.BatchNorm2d(hidden),
        nn.SiLU(),
        nn.Conv2d(hidden, width, 1, bias=False),
        nn.BatchNorm2d(width),
        SqueezeExcite(width),
    ]
    if outputs is None:
        return ResidualCell(nn.Sequential(*layers), None)
    return ResidualCell(
        nn.Sequential(nn.UpsamplingNearest2d(scale_factor=2), *layers), ConvSkip(inputs, width, up=True)
    )


class EncoderCombiner(nn.Module):
    """What the encoder saw plus what the decoder knows so far, (B, C, h, w), by a 1x1 convolution of C channels."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, encoded: Tensor, decoded: Tensor) -> Tensor:
        return encoded + self.conv(decoded)


class DecoderCombiner(nn.Module):
    """Two feature maps to one, (B, C, h, w) and (B, z, h, w), by a 1x1 convolution of C + z channels."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.conv(torch.cat((first, second), dim=1))


class MaskedConv(nn.Conv2d):
    """A convolution whose weights are multiplied by a stored mask; the checkpoint, not a rule, says which mask."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int, *, mirrored: bool, centre: bool) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
        kept = kernel * kernel // 2 + int(centre)
        row = (torch.arange(kernel * kernel) < kept).float()
        row = row.flip(0) if mirrored else row
        self.register_buffer("mask", row.view(1, 1, kernel, kernel).expand_as(self.weight).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding, groups=self.groups)


class FlowStep(nn.Module):
    """One autoregressive shift: z minus a function of the pixels before it in raster order (after it, if mirrored)."""

    def __init__(self, latent_channels: int, *, mirrored: bool) -> None:
        super().__init__()
        hidden = 6 * latent_channels
        self.layers = nn.Sequential(
            MaskedConv(latent_channels, hidden, 3, 1, mirrored=mirrored, centre=True),
            nn.ELU(),
            MaskedConv(hidden, hidden, 5, hidden, mirrored=mirrored, centre=False),
            nn.ELU(),
            MaskedConv(hidden, latent_channels, 1, 1, mirrored=mirrored, centre=False),
        )

    def forward(self, z: Tensor) -> Tensor:
        return z - self.layers(z)


class FlowCell(nn.Module):
    """A forward and a mirrored flow step on a latent (B, z, h, w) (NVAE, section 3.2)."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.cell1 = FlowStep(latent_channels, mirrored=False)
        self.cell2 = FlowStep(latent_channels, mirrored=True)

    def forward(self, z: Tensor) -> Tensor:
        return self.cell2(self.cell1(z))
