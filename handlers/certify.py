"""Certified answers: a radius within which no change of the image changes the answer, by randomized smoothing.

Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing" (ICML 2019): the answer is the
class that a random classifier gives most often when Gaussian noise of standard deviation sigma per pixel is added to
the image. If it gives that class with probability p > 1/2, then it does so for every image nearer than
sigma * Phi^-1(p) in the L2 norm. Here the random classifier purifies one sample and classifies it.

The certificate is sound for images with 8 bits: unbounded noise is added to the 8-bit values and the sum is rounded to
whole numbers, which are then clamped to 0 to 255 as a part of the classifier. So the classifier sees whole numbers
only, and rounding errors of floating-point arithmetic carry no information about the image; other samplers are unsound
for that reason (Voracek and Hein, "Sound Randomized Smoothing in Floating-Point Arithmetic", ICLR 2023,
arXiv:2207.07209). The generator gets a new key from the operating system for every call.

A few draws choose the class, and fresh ones count how often it is given. From this count p is bounded from below by
Clopper-Pearson at alpha, the probability that the radius of an image is too large. If the bound is 1/2 or less, there
is no answer. Another engine or precision is another classifier: its certificates may differ.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from handlers.arrays import BoolArray, FloatArray, IntArray
from handlers.binomial import lower_bound
from handlers.errors import InputError
from handlers.noise import fresh_generator

_ON_GRID = 1e-4
"""In 8-bit steps: the rounding error of a whole number in float32 is smaller."""


@dataclass(frozen=True)
class Certified:
    """Certificates for B images and C classes.

    Attributes:
        labels: (B,), the certified class of each image; -1 if none.
        radii: (B,), in the L2 norm of images in [0, 1]; 0 if no class is certified.
        counts: (B, C), how often each class was given in the counted draws; they sum to less if stages overflowed.
        sigma: standard deviation of the noise, per pixel of images in [0, 1].
        draws: counted noisy images per image.
        alpha: probability, for each image, that its radius is too large.
    """

    labels: IntArray
    radii: npt.NDArray[np.float64]
    counts: IntArray
    sigma: float
    draws: int
    alpha: float

    @property
    def abstained(self) -> BoolArray:
        """(B,): whether no class is certified."""
        return self.labels < 0


def certify(
    classify: Callable[[FloatArray], IntArray],
    images: FloatArray,
    n_classes: int,
    sigma: float,
    draws: int,
    alpha: float,
    batch: int,
) -> Certified:
    """Certify ``images``, (B, 3, H, W) in [0, 1].

    Args:
        classify: the label (R,) of noisy images (R, 3, H, W), each from 0 to ``n_classes`` - 1, or -1 for none. It may
            be random, but must not depend on other images of the batch.
        batch: largest number of images per call of ``classify``.

    Raises:
        InputError: sigma, draws or alpha is out of its range.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise InputError(f"sigma must be more than 0, not {sigma}")
    if draws < 1:
        raise InputError(f"draws must be 1 or more, not {draws}")
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1, not {alpha}")
    first = selection_draws(draws)
    generator = fresh_generator()
    steps = _steps(images)
    tallies = np.zeros((2, len(images), n_classes + 1), np.int64)  # the last class is none
    rows = len(images) * (first + draws)
    for start in range(0, rows, batch):
        owners, places = np.divmod(np.arange(start, min(start + batch, rows)), first + draws)
        noise = generator.standard_normal((len(owners), *images.shape[1:]))
        noisy = np.clip(np.rint(steps[owners] + 255 * sigma * noise), 0, 255).astype(np.float32)
        labels = classify(noisy / np.float32(255))
        np.add.at(tallies, ((places >= first).astype(int), owners, labels), 1)
    chosen = tallies[0, :, :-1].argmax(axis=1)
    counts = tallies[1, :, :-1]
    bounds = [lower_bound(int(count), draws, alpha) for count in counts[np.arange(len(images)), chosen]]
    radii = np.array([sigma * NormalDist().inv_cdf(p) if p > 0.5 else 0.0 for p in bounds])
    return Certified(np.where(radii > 0, chosen, -1), radii, counts, sigma, draws, alpha)


def answer(certified: Certified, item: int, classes: Sequence[str]) -> dict[str, Any]:
    """The entries of an image's JSON answer."""
    label = int(certified.labels[item])
    return {
        "certified_label": None if label < 0 else classes[label],
        "certified_index": None if label < 0 else label,
        "certified_l2": math.floor(certified.radii[item] * 1e6) / 1e6,
        "abstained": bool(certified.abstained[item]),
        "sigma": certified.sigma,
        "alpha": certified.alpha,
        "draws": certified.draws,
    }


def selection_draws(draws: int) -> int:
    """Number of noisy images that choose the class, in addition to ``draws`` counted ones."""
    return min(100, max(10, draws // 10))


def _steps(images: FloatArray) -> npt.NDArray[np.float64]:
    """The images in units of 8-bit steps: whole numbers if they had 8 bits."""
    steps = images.astype(np.float64) * 255
    whole = np.rint(steps)
    return np.where(np.abs(steps - whole) < _ON_GRID, whole, steps)
