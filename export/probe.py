"""Try a classifier on a few random images before any long work, so that a wrong one is refused within seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handlers.errors import MlvgmError

SMALLEST = 1e-30
"""Lower bound of probabilities before their logarithm is taken."""

_TURNED = 0.05
"""Largest change of an image's logits by other images of its batch, as a share of their norm: int8 activations that are
scaled for the whole batch change them a little."""

PROBABILITIES = "returns probabilities (of a softmax or of sigmoids), so their logarithms are taken as logits"
"""The end of "the classifier is adapted: it ..."."""


class ClassifierError(MlvgmError, ValueError):
    """A classifier cannot be used as one."""


@dataclass(frozen=True)
class Habits:
    """Unusual behaviour of a classifier that an export can make up for.

    Attributes:
        probabilities: its outputs are probabilities instead of logits: they sum to one, or all are between 0 and 1.
        in_place: it modifies its input.
    """

    probabilities: bool
    in_place: bool


def probe(classify: Callable[[Tensor], Any], image_size: int, n_classes: int, name: str) -> Habits:
    """Classify one random image, then three, (B, 3, H, W) in [0, 1].

    Raises:
        ClassifierError: the classifier raises, does not return finite logits (B, ``n_classes``), or its answer for an
            image depends on the others of the batch or on chance. The message begins with ``name``.
    """
    images = torch.rand(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    firsts = []
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
                f"{name}: returns shape {tuple(logits.shape)} for {batch} images; {n_classes} classes need "
                f"{(batch, n_classes)}"
            )
        if not logits.is_floating_point():
            raise ClassifierError(f"{name}: returns {logits.dtype}; logits must be floating-point numbers")
        if not torch.isfinite(logits).all():
            raise ClassifierError(f"{name}: returns NaN or infinite logits for a random image")
        firsts.append(logits[0].float())
    alone, beside = firsts
    if (alone - beside).norm() > _TURNED * max(alone.norm(), beside.norm()):
        raise ClassifierError(
            f"{name}: answers otherwise for an image with others in its batch: is batch normalisation or dropout in "
            "training mode, or are random numbers drawn?"
        )
    sums = logits.double().sum(dim=1)
    softmax = (logits >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)
    sigmoids = ((logits > 0) & (logits < 1)).all()
    return Habits(bool(softmax or sigmoids), not torch.equal(given, images))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
