"""The threshold of the attack score above which an image is suspicious, with a known rate of false alarms."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from handlers.binomial import lower_bound
from handlers.errors import InputError

_ROUNDING = 1e-12
"""Relative rounding error of a product: 0.01 times 100 counts as 1."""


@dataclass(frozen=True)
class ScoreThreshold:
    """An image whose score (`handlers.result.Result.scores`) is above ``threshold`` is suspicious.

    Attributes:
        threshold: in nats, 0 or more.
        false_alarms: the share of clean images that may be suspicious on average, from 0 to 1.
        low, high: 95 % confidence interval of the share of clean images that are suspicious.
    """

    threshold: float
    false_alarms: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"threshold is {self.threshold}, must be 0 or more")
        if not 0 <= self.low <= self.high <= 1 or not 0 < self.false_alarms < 1:
            raise ValueError("must have 0 < false_alarms < 1 and 0 <= low <= high <= 1")

    @classmethod
    def of(cls, scores: npt.ArrayLike, false_alarms: float) -> "ScoreThreshold":
        """The smallest threshold that clean images exceed at no more than this rate, on average.

        The k-th least of n scores, k = n + 1 - floor((n + 1) rate), as in split conformal prediction (Vovk, Gammerman
        and Shafer, "Algorithmic Learning in a Random World", 2005): a further clean image exceeds it with probability
        1 - k / (n + 1) at most. Its true rate has a beta distribution with parameters n + 1 - k and k, whatever the
        distribution of the scores.

        Args:
            scores: (n,), of clean images that are like those to be served, and were not used for training or tuning.

        Raises:
            InputError: the rate is out of range, or there are too few scores for it.
        """
        ordered = np.sort(np.asarray(scores, np.float64))
        n = len(ordered)
        if not 0 < false_alarms < 1:
            raise InputError(f"the rate of false alarms must lie between 0 and 1, not {false_alarms}")
        above = math.floor((n + 1) * false_alarms * (1 + _ROUNDING))
        k = n + 1 - above
        if above == 0:
            needed = math.ceil(1 / false_alarms * (1 - _ROUNDING)) - 1
            raise InputError(f"a false-alarm rate of {false_alarms:g} needs {needed} clean images, not {n}")
        low, high = lower_bound(n + 1 - k, n, 0.025), 1 - lower_bound(k, n, 0.025)
        return cls(float(ordered[k - 1]), false_alarms, low, high)
