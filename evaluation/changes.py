"""Sets of changes that an attacker may make to an image, each with its steepest step and its projection."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Change(ABC):
    """A set of changes of images (B, 3, H, W) in [0, 1], described by parameters, a tensor with one row per image.

    Attributes:
        size: of the set: the largest distance of its parameters from those that change nothing, or half their range.
    """

    size: float

    @abstractmethod
    def start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Random parameters within the set."""

    @abstractmethod
    def apply(self, clean: Tensor, parameters: Tensor) -> Tensor:
        """The changed images, within [0, 1]; differentiable in the parameters."""

    def direction(self, gradient: Tensor) -> Tensor:
        """The steepest direction of length 1, in the norm of the set: here the largest of its components."""
        return gradient.sign()

    @abstractmethod
    def project(self, clean: Tensor, parameters: Tensor) -> Tensor:
        """The nearest parameters within the set."""


class L2(Change):
    """Any change of an L2 norm up to ``size``; the parameters are the images."""

    def start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return self.project(clean, clean + self.size * _unit(torch.randn(clean.shape, generator=generator)))

    def apply(self, clean: Tensor, parameters: Tensor) -> Tensor:
        return parameters

    def direction(self, gradient: Tensor) -> Tensor:
        return _unit(gradient)

    def project(self, clean: Tensor, parameters: Tensor) -> Tensor:
        return (clean + torch.renorm(parameters - clean, 2, 0, self.size)).clamp(0, 1)


class Linf(Change):
    """Any change of each value by up to ``size``; the parameters are the images."""

    def start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return (clean + self.size * (2 * torch.rand(clean.shape, generator=generator) - 1)).clamp(0, 1)

    def apply(self, clean: Tensor, parameters: Tensor) -> Tensor:
        return parameters

    def project(self, clean: Tensor, parameters: Tensor) -> Tensor:
        return (clean + (parameters - clean).clamp(-self.size, self.size)).clamp(0, 1)


@dataclass(frozen=True)
class LowFrequency(Change):
    """Shades of an L2 norm up to ``size``; the parameters are the ``waves`` x ``waves`` lowest cosine waves."""

    waves: int = 4

    def start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return self.size * _unit(torch.randn(len(clean), 3, self.waves, self.waves, generator=generator))

    def apply(self, clean: Tensor, parameters: Tensor) -> Tensor:
        rows, columns = (_cosines(side, self.waves) for side in clean.shape[2:])
        return (clean + rows.T @ parameters @ columns).clamp(0, 1)

    def direction(self, gradient: Tensor) -> Tensor:
        return _unit(gradient)

    def project(self, clean: Tensor, parameters: Tensor) -> Tensor:
        return torch.renorm(parameters, 2, 0, self.size)


@dataclass(frozen=True)
class Patch(Change):
    """A square of any content somewhere in the image, ``share`` of its area. Use it with ``size`` 0.5.

    The fourth channel of the parameters is 1 where the patch is.
    """

    share: float = 0.04

    def start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = clean.shape
        side = max(1, round(math.sqrt(self.share * height * width)))
        mask = torch.zeros(count, 1, height, width)
        for i in range(count):
            top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in (height, width))
            mask[i, :, top : top + side, left : left + side] = 1
        return torch.cat([torch.rand(clean.shape, generator=generator), mask], dim=1)

    def apply(self, clean: Tensor, parameters: Tensor) -> Tensor:
        content, mask = parameters[:, :3], parameters[:, 3:].detach()
        return torch.lerp(clean, content, mask)

    def project(self, clean: Tensor, parameters: Tensor) -> Tensor:
        return parameters.clamp(0, 1)


@dataclass(frozen=True)
class Flow(Change):
    """Each point is moved by up to ``size`` pixels, smoothly: the parameters are the moves of a coarse grid."""

    points: int = 4

    def start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return self.size * (2 * torch.rand(len(clean), 2, self.points, self.points, generator=generator) - 1)

    def apply(self, clean: Tensor, parameters: Tensor) -> Tensor:
        height, width = clean.shape[2:]
        moves = F.interpolate(parameters, (height, width), mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
        still = F.affine_grid(torch.eye(2, 3).expand(len(clean), -1, -1), list(clean.shape), align_corners=False)
        moved = still + moves * torch.tensor([2 / width, 2 / height])
        return F.grid_sample(clean, moved, padding_mode="border", align_corners=False).clamp(0, 1)

    def project(self, clean: Tensor, parameters: Tensor) -> Tensor:
        return parameters.clamp(-self.size, self.size)


class Blur(Change):
    """A Gaussian blur with a deviation of up to twice ``size`` pixels along each axis: the parameters are the two."""

    def start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return 2 * self.size * torch.rand(len(clean), 2, generator=generator)

    def apply(self, clean: Tensor, parameters: Tensor) -> Tensor:
        count, channels, height, width = clean.shape
        reach = min(math.ceil(6 * self.size), height - 1, width - 1)
        places = torch.arange(-reach, reach + 1)
        taps = torch.softmax(-(places**2) / (2 * parameters.clamp_min(0.05)[:, :, None] ** 2), dim=2)
        taps = taps.repeat_interleave(channels, dim=0)  # one filter per image and channel
        blurred = F.pad(clean, (reach, reach, reach, reach), mode="reflect").flatten(0, 1)[None]
        blurred = F.conv2d(blurred, taps[:, 0, None, :, None], groups=count * channels)
        return F.conv2d(blurred, taps[:, 1, None, None, :], groups=count * channels).view_as(clean)

    def project(self, clean: Tensor, parameters: Tensor) -> Tensor:
        return parameters.clamp(0, 2 * self.size)


def _unit(direction: Tensor) -> Tensor:
    """``direction``, each row with the L2 norm 1."""
    return F.normalize(direction.flatten(1), dim=1).view(direction.shape)


def _cosines(side: int, waves: int) -> Tensor:
    """(waves, side): the first rows of the orthonormal discrete cosine transform."""
    places = (torch.arange(side) + 0.5) * math.pi / side
    rows = torch.cos(torch.arange(waves)[:, None] * places) * math.sqrt(2 / side)
    rows[0] /= math.sqrt(2)
    return rows
