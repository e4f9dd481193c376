"""A classifier, asked about a few images of noise before any long work: what it cannot do shows in seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handlers.errors import MlvgmError

SMALLEST = 1e-30
"""Probabilities are at least this before a logarithm is taken."""


class ClassifierError(MlvgmError, ValueError):
    """A classifier cannot be used as one."""


@dataclass(frozen=True)
class Habits:
    """What a classifier does that is allowed for.

    Attributes:
        probabilities: its rows sum to one, so they are no logits; their logarithms are.
        in_place: it works in place on its input.
    """

    probabilities: bool
    in_place: bool


def probe(classify: Callable[[Tensor], Any], image_size: int, n_classes: int, name: str) -> Habits:
    """Classify one image and three, (B, 3, H, W) in [0, 1].

    Raises:
        ClassifierError: beginning with ``name``: it raises, or does not give finite logits (B, ``n_classes``).
    """
    images = torch.rand(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    for batch in (1, 3):
        given = images[:batch].clone()
        try:
            with torch.no_grad():
                logits = classify(given)
        except ClassifierError:
            raise
        except Exception as error:  # it is the user's own code
            raise ClassifierError(
                f"{name}: fails on images of shape {tuple(given.shape)}: {type(error).__name__}: {first_line(error)}"
            ) from None
        if not isinstance(logits, Tensor):
            raise ClassifierError(f"{name}: returns a {type(logits).__name__}; it must return one tensor of logits")
        if tuple(logits.shape) != (batch, n_classes):
            raise ClassifierError(
                f"{name}: gives {tuple(logits.shape)} for {batch} images; {n_classes} classes want {(batch, n_classes)}"
            )
        if not logits.is_floating_point():
            raise ClassifierError(f"{name}: gives {logits.dtype}; logits are numbers of floating point")
        if not torch.isfinite(logits).all():
            raise ClassifierError(f"{name}: gives NaN or infinite logits for an image of noise")
    sums = logits.double().sum(dim=1)
    probabilities = bool((logits >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-2))
    return Habits(probabilities, not torch.equal(given, images))


def first_line(error: BaseException) -> str:
    """Of an exception's text, or what it is called."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
