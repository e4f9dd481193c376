"""What both training loops share: shuffled batches, the learning rate, and a line of progress."""

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of one shuffled pass, without the incomplete last batch."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    yield from order[: count - count % size].split(size)


def cosine_rate(step: int, steps: int, warmup: int = 0, floor: float = 0.01) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


class Progress:
    """Prints a line per report, with the time that is left."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.begun = time.monotonic()
        self.first: int | None = None

    def report(self, done: int, **figures: float) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.begun = done, now
        pace = (now - self.begun) / max(done - self.first, 1)
        numbers = "  ".join(f"{key} {value:.4f}" for key, value in figures.items())
        left = pace * (self.total - done) / 60 if done > self.first else float("nan")
        print(f"{self.name} {done}/{self.total}  {numbers}  {left:.0f} min left", flush=True)
