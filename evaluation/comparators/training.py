"""The training loop of all comparators. Its end is a number of steps or of seconds, whichever comes first.

Everything is on the device: the images as 8-bit values, their augmentation, and attacks. The moving average of the
weights is looked at on held-out images from time to time, and the best one so far is in the file. So a run that is
stopped leaves the weights of a report, and robust overfitting (Rice, Wong and Kolter, ICML 2020) does no harm.
"""

import copy
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from handlers.errors import MlvgmError
from mlvgm.files import replacing
from mlvgm.training.data import Signs
from mlvgm.training.images import augment
from mlvgm.training.loop import cosine_rate
from mlvgm.training.recorded import RecordedStep

REPORT_SECONDS, REPORT_SHARE = 15.0, 0.1
"""Least time between reports, and the most of the whole time that they may take."""
AVERAGE = 0.995
"""Decay of the moving average of the weights, per step."""
MAX_NORM = 5.0
"""Gradients are clipped to this norm; a step whose norm is not finite is left out."""
_SHARES = 1000  # of a run, for its learning rate
_CHUNK = 512


class ComparatorError(MlvgmError):
    """A comparator cannot be trained or loaded."""


@dataclass(frozen=True)
class Comparator(ABC):
    """What is trained, and how.

    Attributes:
        steps: of the optimiser.
        batch: images a step.
        rate: highest learning rate.
        warmup: share of the run in which the rate rises.
    """

    steps: int
    batch: int = 256
    rate: float = 0.05
    warmup: float = 0.05

    @abstractmethod
    def begin(self, classes: int) -> nn.Module:
        """The network at the start, on the CPU."""

    @abstractmethod
    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """For the parameters of ``network``."""

    @abstractmethod
    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """To be minimised; ``images`` (B, 3, H, W) in [0, 1] are augmented already, ``network`` is in training mode."""

    @abstractmethod
    def look(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """(B,) each, on held-out images, ``network`` in eval mode; the mean of the first chooses the best weights."""


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, 3, H, W) and labels on one device."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, signs: Signs, device: torch.device) -> "Split":
        images = torch.from_numpy(signs.images).permute(0, 3, 1, 2).contiguous()
        return cls(images.to(device), torch.from_numpy(signs.labels).long().to(device))


def train(
    comparator: Comparator,
    signs: tuple[Signs, Signs],
    file: Path,
    device: torch.device,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
    seed: int = 0,
) -> dict[str, Any]:
    """Train, and keep the best weights in ``file`` (safetensors, under the names of the published format).

    Args:
        signs: images to train on, and those that are held out: other physical signs.
        seconds: after which the run ends, its learning rate having fallen as it would have over all steps.

    Returns:
        What the file's metadata say of the weights: the settings, the step and the figures on held-out images.
    """
    training, held_out = (Split.of(part, device) for part in signs)
    torch.manual_seed(seed)
    network = comparator.begin(int(training.labels.max()) + 1).to(device).requires_grad_(True)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = comparator.optimizer(network)
    begun = time.monotonic()
    report_at = begun + REPORT_SECONDS
    best: dict[str, Any] = {}
    recorded: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    order, total, step, is_last = torch.empty(0), torch.zeros((), device=device), 0, False
    per_epoch = max(1, len(training.labels) // comparator.batch)
    while not is_last:
        if (place := step % per_epoch) == 0:
            order = torch.randperm(len(training.labels), device=device)
        now = time.monotonic()
        share = max(step / comparator.steps, (now - begun) / seconds if seconds else 0.0)
        for group in optimizer.param_groups:
            rise = round(_SHARES * comparator.warmup)
            group["lr"] = comparator.rate * cosine_rate(round(_SHARES * share), _SHARES, rise)
        index = order[place * comparator.batch : (place + 1) * comparator.batch]
        batch = training.images[index].float() / 255.0, training.labels[index]
        if recorded is None:
            gradients = partial(_gradients, comparator, network, optimizer)
            recorded = RecordedStep(gradients, batch, optimizer) if device.type == "cuda" else gradients
        loss, norm = recorded(*batch)
        if torch.isfinite(norm):
            optimizer.step()
            total += loss
        step += 1
        _follow(average, network, min(AVERAGE, step / (step + 10)))
        is_last = step == comparator.steps or (seconds is not None and time.monotonic() - begun >= seconds)
        if is_last or now >= report_at:
            elapsed = time.monotonic() - begun
            figures = _figures(comparator, average, held_out)
            said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            say(f"step {step}, {elapsed:.0f} s: loss {float(total) / step:.4f}, held-out {said}")
            score = next(iter(figures.values()))
            if not best or score >= next(iter(best["held_out"].values())):
                best = {"step": step, "seconds": round(elapsed), "device": _name(device), "held_out": figures}
                best |= {"seed": seed, "settings": asdict(comparator)}
                _save(average, best, file)
            took = time.monotonic() - begun - elapsed
            report_at = begun + elapsed + max(REPORT_SECONDS, took / REPORT_SHARE)
    return best


def _gradients(
    comparator: Comparator, network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Leave the clipped gradients in the network's parameters; the loss, and the norm that they had."""
    loss = comparator.loss(network.train(), augment(images), labels)
    optimizer.zero_grad()
    loss.backward()
    return loss.detach(), torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the averaged weights, and the averaged statistics of batch norms, towards those of ``network``."""
    slow, fast = (
        [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]
        for module in (average, network)
    )
    torch._foreach_lerp_(slow, fast, 1.0 - decay)


def _figures(comparator: Comparator, network: nn.Module, held_out: Split) -> dict[str, float]:
    """The means of what `Comparator.look` finds, with the same noise whenever it is asked."""
    parts: list[Mapping[str, Tensor]] = []
    devices = [held_out.images.device] if held_out.images.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        for images, labels in zip(held_out.images.split(_CHUNK), held_out.labels.split(_CHUNK), strict=True):
            parts.append(comparator.look(network, images.float() / 255.0, labels))
    return {name: round(torch.cat([part[name].float() for part in parts]).mean().item(), 4) for name in parts[0]}


def _save(network: nn.Module, about: Mapping[str, Any], file: Path) -> None:
    """All of it, or the old file stays."""
    # Copies: some families have one tensor under two names, which safetensors refuses to write twice.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in network.state_dict().items()}
    with replacing(file) as draft:
        draft.write_bytes(save(tensors, {"about": json.dumps(about)}))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
