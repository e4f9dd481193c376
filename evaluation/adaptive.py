"""Adaptive attacks: the attacker knows all but the noise, and computes gradients through the whole defence.

Auto-PGD (Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020): gradient ascent with momentum, whose steps halve where they stop paying. Where the defence is
random, every gradient is the mean over fresh draws (expectation over transformation, Athalye et al., ICML 2018).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evaluation.changes import Change


@dataclass(frozen=True)
class Trace:
    """What a defence computes of a batch, with S draws of its noise.

    Attributes:
        logits: (S, B, C).
        stages: what each stage takes, by its name, in the order in which they run; the images come first.
    """

    logits: Tensor
    stages: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


Forward = Callable[[Tensor, int], Trace]
"""Images (B, 3, H, W) in [0, 1] and the number of draws to what the defence computes, differentiably."""


@dataclass(frozen=True)
class Effort:
    """What an attack may cost.

    Attributes:
        steps: of gradient ascent.
        restarts: from fresh starting points, each on the images that have resisted so far.
        draws: of the noise of a random defence, that each gradient is averaged over.
        bf16: whether PyTorch computes in bf16 where it keeps its accuracy (autocast): about twice as fast on a CPU with
            AMX. What an attack finds is judged in full precision all the same.
    """

    steps: int = 20
    restarts: int = 1
    draws: int = 1
    bf16: bool = False


def in_precision(forward: Forward, effort: Effort, device: str) -> Forward:
    """``forward``, which runs on ``device``, in the precision that ``effort`` asks for."""
    if not effort.bf16:
        return forward

    def run(images: Tensor, draws: int) -> Trace:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            trace = forward(images, draws)
        return Trace(trace.logits.float(), trace.stages)

    return run


@dataclass(frozen=True)
class AscentResult:
    """The best images (B, 3, H, W) of one ascent, and the margin of the true class there.

    Attributes:
        images: those with the least margin, before they are rounded to 8 bits.
        margins: (B,), the mean over the draws.
        earlier: (B,), the least margin after three quarters of the steps.
    """

    images: Tensor
    margins: Tensor
    earlier: Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,): the loss of the mean logits, of (S, B, C)."""
    return torch.nn.functional.cross_entropy(logits.mean(dim=0), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,): by how much the true class beats the best other one, in the mean logits of (S, B, C)."""
    mean, index = logits.mean(dim=0), labels[:, None]
    return mean.gather(1, index).squeeze(1) - mean.scatter(1, index, -torch.inf).amax(dim=1)


LOSSES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda logits, labels: -margin(logits, labels),
    cross_entropy,
)
"""To be maximised, one restart after the other. The margin never saturates; cross-entropy weighs all classes."""


Penalty = Callable[[Tensor, Tensor], Tensor]
"""Of images (B, 3, H, W) and their logits (S, B, C): (B,), what the attacker wants to keep low, 0 or more."""

SURE = 1.0
"""Margin, in logits, by which an image has to be misclassified before an attacker looks at its penalty alone."""


def ascend(
    forward: Forward,
    clean: Tensor,
    labels: Tensor,
    change: Change,
    effort: Effort,
    attempt: int = 0,
    seed: int = 0,
    penalty: Penalty | None = None,
) -> AscentResult:
    """One run of Auto-PGD within ``change``; ``attempt`` chooses the loss and the starting point.

    With a ``penalty`` the loss is the margin, up to `SURE`, less the penalty; of the images that are surely
    misclassified, that of the least penalty is kept.
    """
    loss, generator = LOSSES[attempt % len(LOSSES)], torch.Generator().manual_seed(seed + 7919 * attempt)
    count, momentum = len(clean), 0.75
    best_images, least = clean, torch.full((count,), torch.inf)
    earlier = least

    def look(parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (B,) and its gradient; keeps the images of the least margin."""
        nonlocal best_images, least
        parameters = parameters.detach().requires_grad_()
        images = change.apply(clean, parameters)
        logits = forward(images, effort.draws).logits
        margins = margin(logits.detach(), labels)
        if penalty is None:
            value, rank = loss(logits, labels), margins
        else:
            price = penalty(images, logits)
            value = (-margin(logits, labels)).clamp_max(SURE) - price
            rank = torch.where(margins < -SURE, -SURE - 1 / (1 + price.detach()), margins)
        (gradient,) = torch.autograd.grad(value.sum(), parameters)
        better = rank < least
        least = torch.where(better, rank, least)
        best_images = torch.where(better[:, None, None, None], images.detach(), best_images)
        return value.detach(), gradient.nan_to_num(0.0, 0.0, 0.0)  # `examine` tells where it is broken

    def rows(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (here.ndim - 1))

    here = before = change.start(clean, generator)
    value, gradient = look(here)
    peak, peak_value, peak_gradient = here, value, gradient
    length = torch.full((count,), 2 * change.size)
    checkpoints = _checkpoints(effort.steps)
    gains, since = torch.zeros(count), 0
    halved, peak_then = torch.ones(count, dtype=torch.bool), peak_value
    for step in range(1, effort.steps + 1):
        straight = change.project(clean, here + rows(length) * change.direction(gradient))
        ahead = straight
        if step > 1:
            ahead = change.project(clean, here + momentum * (straight - here) + (1 - momentum) * (here - before))
        before, here, last = here, ahead, value
        value, gradient = look(here)
        gains, since = gains + (value > last), since + 1
        better = value > peak_value
        peak, peak_gradient = torch.where(rows(better), here, peak), torch.where(rows(better), gradient, peak_gradient)
        peak_value = torch.where(better, value, peak_value)
        if step == -(-3 * effort.steps // 4):
            earlier = least
        if step in checkpoints:
            stuck = (gains < 0.75 * since) | (~halved & (peak_value <= peak_then))
            length = torch.where(stuck, length / 2, length)
            here, gradient = torch.where(rows(stuck), peak, here), torch.where(rows(stuck), peak_gradient, gradient)
            value = torch.where(stuck, peak_value, value)
            halved, peak_then, gains, since = stuck, peak_value, torch.zeros(count), 0
    return AscentResult(best_images, least, earlier)


@dataclass(frozen=True)
class Gradients:
    """Whether the gradients of a defence are fit to attack it.

    Attributes:
        zero, broken: stage -> share of images whose gradient at its input is zero, or not finite.
        cosine: of two gradients at the same image, each the mean over as many draws as the attack takes; the mean over
            images. 1 where a defence is deterministic.
    """

    zero: dict[str, float]
    broken: dict[str, float]
    cosine: float


def examine(forward: Forward, clean: Tensor, labels: Tensor, draws: int) -> Gradients:
    """Take two gradients of the margin at each of ``clean``, and look at them stage by stage."""
    found = []
    for _ in range(2):
        images = clean.detach().requires_grad_()
        trace = forward(images, draws)
        stages = {"images": (images,), **trace.stages}
        inputs = [tensor for tensors in stages.values() for tensor in tensors]
        gradients = iter(torch.autograd.grad(margin(trace.logits, labels).sum(), inputs, allow_unused=True))
        found.append(
            {name: _per_image([next(gradients) for _ in tensors], len(clean)) for name, tensors in stages.items()}
        )
    first, second = (gradients["images"] for gradients in found)
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=1)
    norms = {name: gradient.norm(dim=1) for name, gradient in found[0].items()}
    return Gradients(
        {name: float((norm == 0).float().mean()) for name, norm in norms.items()},
        {name: float((~norm.isfinite()).float().mean()) for name, norm in norms.items()},
        float(cosine.nan_to_num().mean()),
    )


def _per_image(gradients: list[Tensor | None], count: int) -> Tensor:
    """(B, N): all that a stage was given for an image, over its draws."""
    parts = [g.reshape(-1, count, g[0].numel()).transpose(0, 1).flatten(1) for g in gradients if g is not None]
    return torch.cat(parts, dim=1) if parts else torch.zeros(count, 1)


def _checkpoints(steps: int) -> set[int]:
    """After which steps the length is looked at: the first after 22 % of them, then ever more often."""
    shares, found = [0.0, 0.22], set()
    while shares[-1] <= 1:
        found.add(math.ceil(round(shares[-1] * steps, 6)))
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return found
