"""Exact bounds on a probability from a count, without SciPy."""

import numpy as np

_ROUNDING = 1e-9
"""Of a probability, relatively: more than the sums below lose, so that a bound errs on the safe side."""


def lower_bound(count: int, n: int, alpha: float) -> float:
    """The lower Clopper-Pearson bound (Biometrika 1934) of a probability, given ``count`` successes in ``n`` trials.

    It is the smallest p for which ``count`` or more successes have probability ``alpha``: the true probability is below
    it with probability ``alpha`` at most. Also the ``alpha`` quantile of the beta distribution (count, n - count + 1).
    """
    if count == 0:
        return 0.0
    reached = np.arange(count, n + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])  # of factorials
    chosen = logs[n] - logs[reached] - logs[n - reached]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        tail = np.exp(chosen + reached * np.log(middle) + (n - reached) * np.log1p(-middle)).sum()
        low, high = (middle, high) if tail <= alpha * (1 - _ROUNDING) else (low, middle)
    return low
