"""Shares of images with their 95 % intervals: computed, compared, and as text."""

import math
from collections.abc import Mapping
from typing import Any

from handlers.arrays import BoolArray


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of ``count`` among ``n`` (Wilson, JASA 1927); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, count / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def share(mask: BoolArray) -> dict[str, Any]:
    """The share of True with its interval, for a report."""
    count, n = int(mask.sum()), int(mask.size)
    low, high = wilson(count, n)
    return {"share": count / n if n else None, "low": low, "high": high, "count": count, "n": n}


def overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the intervals of two shares have a part in common: then there is no difference to speak of."""
    return bool(one["low"] <= other["high"] and other["low"] <= one["high"])


def percent(entry: Mapping[str, Any], digits: int = 1) -> str:
    """A `share` with its interval: "97.5% (92.9-99.1)"."""
    if entry["share"] is None:
        return "none"
    return f"{entry['share']:.{digits}%} ({100 * entry['low']:.{digits}f}-{100 * entry['high']:.{digits}f})"
