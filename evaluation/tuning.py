"""Search for alphas: how much of each latent to resample.

Little resampling leaves attacks in place, much of it removes what the classifier needs, so the score is the mean of the
accuracies on clean and on attacked images. A few scaled schedules come first, then Bayesian optimisation.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.arrays import IntArray, Pixels
from handlers.errors import MlvgmError
from handlers.pipeline import Pipeline

SCALES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
STEP = 0.005
"""Resolution of the alphas: smaller differences cannot be measured."""
_REPEATED = 50  # maximum number of proposals that repeat a trial
_CHUNK = 64

Weights = tuple[float, ...]


class TuningError(MlvgmError):
    """The search cannot run."""


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


@dataclass(frozen=True)
class Sets:
    """Images that alphas are compared on: the same ones clean and under each attack, and their true classes.

    Attributes:
        clean, attacked: uint8 (N, H, W, 3) each.
        labels: (N,).
    """

    clean: Pixels
    attacked: Mapping[str, Pixels]
    labels: IntArray

    def part(self, rows: slice) -> "Sets":
        """Only these ``rows``."""
        return Sets(self.clean[rows], {name: i[rows] for name, i in self.attacked.items()}, self.labels[rows])


Objective = Callable[[Weights, str], Trial]
"""Takes weights and their origin, and scores them."""


def objective(pipeline: Pipeline, sets: Sets, samples: int) -> Objective:
    """Scores weights by purifying all of ``sets`` with a vote of ``samples`` samples.

    The noise is the same for all weights, so that they are compared and not their luck.
    """

    def right(images: Pixels, weights: Weights) -> NDArray[np.float64]:
        parts = []
        for start in range(0, len(images), _CHUNK):
            part = images[start : start + _CHUNK]
            result = pipeline.run(part, samples, range(start, start + len(part)), alphas=list(weights))
            parts.append(result.labels == sets.labels[start : start + _CHUNK])
        return np.concatenate(parts).astype(np.float64)

    def score(weights: Weights, origin: str) -> Trial:
        on_attacked = np.mean([right(images, weights) for images in sets.attacked.values()], axis=0)
        on_clean = right(sets.clean, weights)
        scores = (on_clean + on_attacked) / 2
        return Trial(weights, origin, float(on_clean.mean()), float(on_attacked.mean()), scores)

    return score


def search(score: Objective, n: int, trials: int, tell: Callable[[Trial], object] = lambda _: None) -> list[Trial]:
    """All trials, the best first. Optuna's Gaussian process continues from the scaled schedules.

    The published search (Serez et al., WACV 2025) is Bayesian optimisation with expected improvement, from five
    schedules.

    Args:
        n: number of alphas.
        trials: maximum number of trials; there are fewer if the process repeats its proposals.
        tell: called with each trial.
    """
    optuna = _optuna()
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.GPSampler(seed=0, n_startup_trials=0))
    done: dict[Weights, Trial] = {}
    starts = dict.fromkeys(weights for _, weights in schedules(n))
    origins = {weights: origin for origin, weights in schedules(n)}
    for weights in starts:
        study.enqueue_trial({str(i): weight for i, weight in enumerate(weights)})
    for _ in range(trials + _REPEATED):
        asked = study.ask()
        weights = tuple(asked.suggest_float(str(i), 0.0, 1.0, step=STEP) for i in range(n))
        if weights not in done:
            if len(done) == trials:
                break
            done[weights] = score(weights, origins.get(weights, "Bayesian optimisation"))
            tell(done[weights])
        study.tell(asked, done[weights].score)
    return ranked(done.values())


def schedules(n: int) -> Iterator[tuple[str, Weights]]:
    """No resampling, and the linear, cosine and constant schedules of ``n`` weights at each of `SCALES`."""
    linear = [(i + 1) / n for i in range(n)]
    shapes = {"linear": linear, "cosine": [0.5 * (1 - math.cos(math.pi * a)) for a in linear], "constant": [1.0] * n}
    yield "no resampling", (0.0,) * n
    for scale in SCALES:
        for name, shape in shapes.items():
            yield f"{name} x {scale:g}", tuple(round(round(scale * a / STEP) * STEP, 3) for a in shape)


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


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise TuningError("Optuna is not installed: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
