"""An adaptive attack: the attacker knows all but the noise, and computes gradients through the whole defence.

Projected gradient descent within an L2 ball (Madry et al., ICLR 2018), whose gradient is averaged over fresh draws of
the purifier's noise (expectation over transformation, Athalye et al., ICML 2018), through the eager purifier and the
classifier without any approximation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluation.attacks import to_bytes, to_float
from evaluation.progress import track
from mlvgm.load import Default

Logits = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [0, 1] to logits (S, B, C): of S samples, each with its own noise."""

_CHUNK = 25


@dataclass(frozen=True)
class PgdSettings:
    """Settings of projected gradient descent.

    Attributes:
        l2: radius of the ball, for images in [0, 1].
        steps: number of steps; each has the length 2.5 * l2 / steps.
        seed: seed of the starting points.
    """

    l2: float
    steps: int = 20
    seed: int = 0


def bare(classifier: nn.Module) -> Logits:
    """The classifier without any defence."""

    def logits(images: Tensor) -> Tensor:
        alone: Tensor = classifier(images)
        return alone[None]

    return logits


def defended(default: Default, samples: int, seed: int) -> Logits:
    """The classifier behind the purifier as it is served, with ``samples`` independent draws of the noise."""
    recipe, purifier = default.recipe, default.purifier
    generator = torch.Generator().manual_seed(seed)

    def logits(images: Tensor) -> Tensor:
        repeated = images.repeat(samples, 1, 1, 1)
        purified = purifier.purify(
            repeated,
            [torch.randn(len(repeated), *shape, generator=generator) for shape in purifier.noise_shapes],
            default.alphas,
            blur=recipe.blur,
            input_noise=torch.randn(repeated.shape, generator=generator) if recipe.input_noise_l2 else None,
            input_noise_l2=recipe.input_noise_l2,
        )
        classified: Tensor = default.classifier(purified.images)
        return classified.view(samples, len(images), -1)

    return logits


def attack_within(
    logits: Logits, images: NDArray[np.uint8], labels: NDArray[np.int64], settings: PgdSettings, what: str = "PGD"
) -> NDArray[np.uint8]:
    """8-bit images (B, H, W, 3) within the ball around ``images`` that minimise the margin of ``labels``.

    Returns the iterate with the smallest mean margin over its samples. Rounding to 8 bits may leave the ball a little.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    parts = []
    for start in track(range(0, len(images), _CHUNK), what, f"x{_CHUNK} image"):
        clean, truth = to_float(images[start : start + _CHUNK]), torch.from_numpy(labels[start : start + _CHUNK])
        parts.append(to_bytes(_descend(logits, clean, truth, settings, generator)))
    return np.concatenate(parts)


def _descend(
    logits: Logits, clean: Tensor, labels: Tensor, settings: PgdSettings, generator: torch.Generator
) -> Tensor:
    step = 2.5 * settings.l2 / settings.steps
    images = _project(clean + step * _unit(torch.randn(clean.shape, generator=generator)), clean, settings.l2)
    best, lowest = images, torch.full((len(clean),), torch.inf)
    for _ in range(settings.steps + 1):
        images = images.detach().requires_grad_()
        margin = _margins(logits(images), labels).mean(dim=0)
        better = margin.detach() < lowest
        lowest = torch.where(better, margin.detach(), lowest)
        best = torch.where(better[:, None, None, None], images.detach(), best)
        (gradient,) = torch.autograd.grad(margin.sum(), images)
        images = _project(images - step * _unit(gradient), clean, settings.l2)
    return best


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(S, B): the logit of the true class minus the largest other logit. Unlike cross-entropy, it does not saturate."""
    index = labels.expand(len(logits), -1)[:, :, None]
    others = logits.scatter(2, index, -torch.inf)
    margins: Tensor = logits.gather(2, index).squeeze(2) - others.amax(dim=2)
    return margins


def _unit(direction: Tensor) -> Tensor:
    norm = direction.flatten(1).norm(dim=1).clamp_min(1e-12)
    scaled: Tensor = direction / norm[:, None, None, None]
    return scaled


def _project(images: Tensor, clean: Tensor, l2: float) -> Tensor:
    change = images.detach() - clean
    norm = change.flatten(1).norm(dim=1).clamp_min(1e-12)
    inside: Tensor = clean + change * (l2 / norm).clamp_max(1.0)[:, None, None, None]
    return inside.clamp(0, 1)
