"""Search for alphas: how much of each latent to resample.

Little resampling leaves attacks in place, much of it removes what the classifier needs, so the score is the mean of the
accuracies on clean and on attacked images. First a few schedules are scaled, then the best one is varied alpha by
alpha.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from evaluation.defences import Images, Labels
from handlers.pipeline import Pipeline

SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
STEPS = (0.3, 0.15, 0.07)
_CHUNK = 64

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """Alphas and their result: the accuracy after purification of clean and attacked images.

    ``scores``, (N,) in [0, 1], is the same for each image: the mean of clean and attacked.
    """

    weights: Weights
    origin: str
    clean: float
    attacked: float
    scores: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), compare=False, repr=False)

    @property
    def score(self) -> float:
        return (self.clean + self.attacked) / 2


@dataclass(frozen=True)
class Gain:
    """By how much the mean score of one trial exceeds that of another on the same images, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0


Objective = Callable[[Weights, str], Trial]


def objective(
    pipeline: Pipeline, clean: Images, attacked: Mapping[str, Images], labels: Labels, samples: int, seed: int = 0
) -> Objective:
    """Scores weights by purifying ``clean`` and each set of ``attacked`` images, (N, H, W, 3), with a vote of
    ``samples`` samples. The noise is the same for all weights, so that they are compared and not their luck.
    """

    def right(images: Images, weights: Weights) -> NDArray[np.float64]:
        parts = []
        for start in range(0, len(images), _CHUNK):
            part = images[start : start + _CHUNK]
            seeds = range(seed + start, seed + start + len(part))
            result = pipeline.run(part, samples=samples, seeds=seeds, alphas=list(weights))
            parts.append(result.labels == labels[start : start + _CHUNK])
        return np.concatenate(parts).astype(np.float64)

    def score(weights: Weights, origin: str) -> Trial:
        on_attacked = np.mean([right(images, weights) for images in attacked.values()], axis=0)
        on_clean = right(clean, weights)
        scores = (on_clean + on_attacked) / 2
        return Trial(weights, origin, float(on_clean.mean()), float(on_attacked.mean()), scores)

    return score


def search(score: Objective, n: int, trials: int, tell: Callable[[Trial], object] = lambda _: None) -> list[Trial]:
    """All trials, the best first. Stops early when no change of a single alpha is an improvement.

    Args:
        n: number of alphas.
        trials: maximum number of trials; the scaled schedules come first.
        tell: called with each trial.
    """
    done: dict[Weights, Trial] = {}

    def attempt(weights: Weights, origin: str) -> Trial:
        if weights not in done:
            done[weights] = score(weights, origin)
            tell(done[weights])
        return done[weights]

    def full() -> bool:
        return len(done) >= trials

    for origin, weights in schedules(n):
        if not full():
            attempt(weights, origin)
    best = ranked(done.values())[0]
    for step in STEPS:
        before = None
        while before != best and not full():
            before = best
            for i in range(n):
                for origin, weights in _moves(best.weights, i, step):
                    trial = best if full() else attempt(weights, origin)
                    if trial.score > best.score:
                        best = trial
                        break
    return ranked(done.values())


def schedules(n: int) -> Iterator[tuple[str, Weights]]:
    """The linear, cosine and constant schedules of ``n`` weights, at each of `SCALES`."""
    linear = [(i + 1) / n for i in range(n)]
    shapes = {"linear": linear, "cosine": [0.5 * (1 - math.cos(math.pi * a)) for a in linear], "constant": [1.0] * n}
    for scale in SCALES:
        for name, shape in shapes.items():
            yield f"{name} x {scale:g}", _rounded(scale * a for a in shape)


def gain(trial: Trial, over: Trial, candidates: int = 1) -> Gain:
    """The gain of ``trial`` over another on the same images and noise, by the differences of single images.

    Args:
        candidates: number of trials of which ``trial`` was the best on these images; widens the interval (Bonferroni).
    """
    differences = trial.scores - over.scores
    # One image more for and one against, as Agresti and Min (Statistics in Medicine, 2005): few images, or all of one
    # mind, would otherwise seem to leave no doubt.
    padded = np.append(differences, (1.0, -1.0))
    half = NormalDist().inv_cdf(1 - 0.025 / candidates) * float(padded.std()) / math.sqrt(len(padded))
    centre = float(padded.mean())
    return Gain(float(differences.mean()), centre - half, centre + half)


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """Trials, the best first; of equal ones the one found first."""
    return sorted(trials, key=lambda trial: -trial.score)


def describe(trial: Trial) -> str:
    """One line about a trial."""
    weights = " ".join(f"{a:g}" for a in trial.weights)
    return f"score {trial.score:.4f} = ({trial.clean:.4f} clean + {trial.attacked:.4f} attacked) / 2: {weights}"


def _moves(weights: Weights, i: int, step: float) -> Iterator[tuple[str, Weights]]:
    """The alphas with alpha ``i`` one step higher, and one step lower, within [0, 1]."""
    for change in (step, -step):
        moved = min(1.0, max(0.0, weights[i] + change))
        if moved != weights[i]:
            yield f"weight {i} {change:+g}", _rounded([*weights[:i], moved, *weights[i + 1 :]])


def _rounded(weights: Iterable[float]) -> Weights:
    return tuple(round(a, 3) for a in weights)
