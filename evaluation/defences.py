"""Defences: the purifier as it is served, the classifier alone, and two simple baselines."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.attacks import to_float
from evaluation.progress import track
from handlers.pipeline import Pipeline
from mlvgm.preprocess import add_noise, blur_images, gaussian_taps

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

NOISE_L2 = 1.0
"""L2 norm of the noise defence, for images in [0, 1]: half of that in the paper's ablation at 64x64."""

_CHUNK = 64


@dataclass(frozen=True)
class Predictions:
    """The predictions of a defence for N images.

    Attributes:
        labels: (N,), the predicted classes.
        sample_labels: (N, S), the class of each of the S purified or noisy samples that vote.
        flagged: (N,), whether the label differs from that of the classifier alone.
    """

    labels: Labels
    sample_labels: Labels
    flagged: NDArray[np.bool_]

    @property
    def agreement(self) -> NDArray[np.float64]:
        """(N,): share of the samples that vote for the predicted class."""
        share: NDArray[np.float64] = (self.sample_labels == self.labels[:, None]).mean(axis=1)
        return share


Defence = Callable[[Images], Predictions]


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of ``count`` among ``n`` (Wilson, JASA 1927); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, count / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def share(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The share of True with its interval, for a report."""
    count, n = int(mask.sum()), int(mask.size)
    low, high = wilson(count, n)
    return {"share": count / n if n else None, "low": low, "high": high, "count": count, "n": n}


def bare(pipeline: Pipeline) -> Defence:
    """No defence: the classifier of the bundle alone."""

    def predict(images: Images) -> Predictions:
        labels = _classify(pipeline, images.__getitem__, len(images))
        return Predictions(labels, labels[:, None], np.zeros(len(images), np.bool_))

    return predict


def blur(pipeline: Pipeline) -> Defence:
    """The classifier behind a Gaussian blur with sigma 1."""

    def predict(images: Images) -> Predictions:
        taps = gaussian_taps(7)
        labels = _classify(pipeline, lambda part: _array(blur_images(to_float(images[part]), taps)), len(images))
        return Predictions(labels, labels[:, None], labels != bare(pipeline)(images).labels)

    return predict


def noise(pipeline: Pipeline, samples: int, seed: int = 0, l2: float = NOISE_L2) -> Defence:
    """A vote of the classifier over ``samples`` noisy samples, each with Gaussian noise of norm ``l2``."""

    def predict(images: Images) -> Predictions:
        generator = torch.Generator().manual_seed(seed)

        def noisy(part: slice) -> NDArray[np.float32]:
            clean = to_float(images[part])
            return _array(add_noise(clean, torch.randn(clean.shape, generator=generator), l2))

        voters = np.stack([_classify(pipeline, noisy, len(images)) for _ in range(samples)], axis=1)
        labels = vote(voters)
        return Predictions(labels, voters, labels != bare(pipeline)(images).labels)

    return predict


def purifier(pipeline: Pipeline, samples: int, seed: int = 0, alphas: str | list[float] | None = None) -> Defence:
    """The whole pipeline as it is served; image i has the seed ``seed`` + i."""

    def predict(images: Images) -> Predictions:
        labels, voters, flagged = [], [], []
        for start in track(range(0, len(images), _CHUNK), f"purifying, {samples} samples each", f"x{_CHUNK} image"):
            part = images[start : start + _CHUNK]
            seeds = range(seed + start, seed + start + len(part))
            result = pipeline.run(part, samples=samples, seeds=seeds, alphas=alphas)
            labels.append(result.labels)
            voters.append(result.sample_labels)
            flagged.append(result.flagged)
        return Predictions(np.concatenate(labels), np.concatenate(voters), np.concatenate(flagged))

    return predict


def gaussian(images: Images, sigma: float, seed: int) -> Images:
    """Images with Gaussian noise of standard deviation ``sigma``, for pixels in [0, 1], rounded to 8 bits."""
    drawn = np.random.default_rng(seed).standard_normal(images.shape, np.float32)
    noisy: Images = (images + 255 * np.float32(sigma) * drawn).round().clip(0, 255).astype(np.uint8)
    return noisy


def vote(sample_labels: Labels) -> Labels:
    """(N,): the most frequent class of labels (N, S); the first one if there is a tie."""
    return np.array([np.bincount(row).argmax() for row in sample_labels])


def sample_deviation(
    pipeline: Pipeline, images: Images, samples: int, seed: int = 0, alphas: str | list[float] | None = None
) -> float:
    """Standard deviation of the purified samples of an image, averaged over pixels and images."""
    deviations = []
    for start in range(0, len(images), _CHUNK):
        part = images[start : start + _CHUNK]
        result = pipeline.run(part, samples, seeds=range(seed + start, seed + start + len(part)), alphas=alphas)
        deviations.append(result.purified.std(axis=1, ddof=1).mean(axis=(1, 2, 3)))
    return float(np.concatenate(deviations).mean())


def _classify(pipeline: Pipeline, images: Callable[[slice], NDArray[Any]], count: int) -> Labels:
    parts = [pipeline.classify(images(slice(i, i + _CHUNK))).argmax(axis=1) for i in range(0, count, _CHUNK)]
    labels: Labels = np.concatenate(parts)
    return labels


def _array(images: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = images.clamp(0, 1).numpy()
    return array
