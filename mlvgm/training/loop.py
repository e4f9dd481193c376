"""What the training loops share: the order of the images and the learning rate."""

import math

import numpy as np
from numpy.typing import NDArray


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """The numbers below ``count`` in the order of one pass."""
    return np.random.default_rng(seed).permutation(count)


def cosine_rate(step: int, steps: int, warmup: int = 0, floor: float = 0.01) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
