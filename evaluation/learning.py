"""Alphas by gradient descent, the paper's other way to choose them (Serez et al., WACV 2025; see `evaluation.tuning`).

The loss is the cross-entropy of one purified sample, the mean over clean images and attacked ones, as the score of a
search is the mean of both accuracies. It sees how far from wrong an answer is; a search sees the votes that count.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from evaluation.attacks import to_float
from evaluation.tuning import STEP, Sets, Weights, schedules
from export.fold import fast
from handlers.arrays import IntArray
from mlvgm.purifier import Purifier
from mlvgm.training.loop import cosine_rate, shuffled

STARTS = ("linear x 0.4", "cosine x 1", "constant x 0.1")
RATE = 0.05


def starts(n: int, own: Weights) -> dict[str, Weights]:
    """Where to begin: the bundle's own ``n`` alphas, and some scaled schedules."""
    scaled = dict(schedules(n))
    return {"the bundle's own": own, **{name: scaled[name] for name in STARTS}}


def learn(
    purifier: Purifier,
    classifier: nn.Module,
    sets: Sets,
    start: Weights,
    steps: int = 60,
    batch: int = 32,
    blur: bool = False,
    input_noise_l2: float = 0.0,
    seed: int = 0,
) -> Weights:
    """The alphas after ``steps`` steps of Adam from ``start``, rounded to `evaluation.tuning.STEP`.

    Args:
        batch: images per step, half of them attacked.
        blur, input_noise_l2: as the bundle purifies.
    """
    purifier, classifier = fast(purifier), fast(classifier)
    alphas = torch.tensor(start, requires_grad=True)
    descent = torch.optim.Adam([alphas], RATE)
    generator = torch.Generator().manual_seed(seed)
    rows, attacked = _batches(len(sets.labels), max(1, batch // 2), seed), list(sets.attacked.values())
    for step in range(steps):
        chosen = next(rows)
        images = to_float(np.concatenate([sets.clean[chosen], attacked[step % len(attacked)][chosen]]))
        noise = [torch.randn(len(images), *shape, generator=generator) for shape in purifier.noise_shapes]
        added = torch.randn(images.shape, generator=generator) if input_noise_l2 else None
        purified = purifier.purify(images, noise, alphas, blur, added, input_noise_l2).images
        loss = F.cross_entropy(classifier(purified), torch.from_numpy(np.tile(sets.labels[chosen], 2)))
        descent.zero_grad()
        loss.backward()
        descent.param_groups[0]["lr"] = RATE * cosine_rate(step, steps)
        descent.step()
        with torch.no_grad():
            alphas.clamp_(0.0, 1.0)
    return tuple(round(round(alpha / STEP) * STEP, 3) for alpha in alphas.tolist())


def _batches(count: int, size: int, seed: int) -> Iterator[IntArray]:
    """Rows for step after step, pass after pass in another order."""
    while True:
        order = shuffled(count, seed)
        yield from (order[i : i + size] for i in range(0, count, size))
        seed += 1
