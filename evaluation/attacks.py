"""DeepFool and Carlini-Wagner attacks on a classifier; the results are 8-bit images, which can be sent to a server.

Both attacks are foolbox's and find a misclassified image close to the original in the L2 norm. It is so close to the
decision boundary that rounding to 8 bits often makes it correct again. So the perturbation is scaled up until the
rounded image is misclassified; if no scale achieves that, the attack has failed.
"""

import contextlib
import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.adaptive import margin
from evaluation.progress import track
from export.fold import fast
from handlers.arrays import BoolArray, FloatArray, IntArray, Pixels
from handlers.errors import MlvgmError
from mlvgm.checkpoint import weights_digest
from mlvgm.npz import NpzError, read_npz, write_npz

OVERSHOOTS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0)
"""Factors by which a perturbation is scaled, in turn, until it survives rounding."""

MARGIN = 0.01
"""Smallest lead of the wrong class, in logits: more than the numerical difference between two runtimes."""

_CHUNK = 250


class AttackError(MlvgmError):
    """The attack cannot be run."""


@dataclass(frozen=True)
class DeepFool:
    """Moosavi-Dezfooli, Fawzi and Frossard, CVPR 2016.

    Attributes:
        rounds: maximum numbers of steps. Most images need one or two, so each number is tried only on the images that
            resisted the previous one; the result is the same as with the last number for all images.
        candidates: number of most likely classes whose boundaries are considered.
        overshoot: relative distance by which the boundary is crossed.
    """

    rounds: tuple[int, ...] = (2, 6, 50)
    candidates: int = 6
    overshoot: float = 0.02

    def perturb(self, classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The attacked images, (B, 3, H, W) in [0, 1]; if an attack fails, its last iterate."""
        result = images.clone()
        waiting = torch.arange(len(images))
        for steps in self.rounds:
            attack = load_foolbox().attacks.L2DeepFoolAttack(
                steps=steps, candidates=self.candidates, overshoot=self.overshoot
            )
            result[waiting] = _run_foolbox(attack, classifier, images[waiting], labels[waiting])
            waiting = waiting[~_fooled(classifier, result[waiting], labels[waiting], 0.0)]
            if not len(waiting):
                break
        return result


@dataclass(frozen=True)
class CarliniWagner:
    """Carlini and Wagner, IEEE S&P 2017, in the L2 norm.

    Attributes:
        searches: number of values tried for the constant that weighs misclassification against distance: ten times
            the last until an attack succeeds, then the middle between the largest failure and the smallest success.
        steps: steps of Adam for each value.
        stepsize: of Adam, in the space that tanh maps to images.
        initial_const: the first value.
        confidence: lead of the wrong class in logits.
    """

    searches: int = 3
    steps: int = 28
    stepsize: float = 0.04
    initial_const: float = 0.3
    confidence: float = 0.0

    def perturb(self, classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The attacked images, (B, 3, H, W) in [0, 1]; if an attack fails, the image itself."""
        attack = load_foolbox().attacks.L2CarliniWagnerAttack(
            binary_search_steps=self.searches,
            steps=self.steps,
            stepsize=self.stepsize,
            initial_const=self.initial_const,
            confidence=self.confidence,
            abort_early=True,
        )
        result = _run_foolbox(attack, classifier, images, labels)
        failed = (result == 0).flatten(1).all(dim=1)  # foolbox returns a black image then, which may be misclassified
        return torch.where(failed[:, None, None, None], images, result)


Method = DeepFool | CarliniWagner
METHODS: dict[str, Method] = {"deepfool": DeepFool(), "cw": CarliniWagner()}


@dataclass(frozen=True)
class AttackResult:
    """An attacked batch.

    Attributes:
        images: uint8 (B, H, W, 3); the clean image if the attack failed.
        fooled: (B,), whether the classifier misclassifies ``images``.
        l2: (B,), norm of the perturbation, for images in [0, 1]; 0 if the clean image is misclassified, or the attack
            failed.
    """

    images: Pixels
    fooled: BoolArray
    l2: FloatArray


def attack(
    classifier: nn.Module,
    images: Pixels,
    labels: IntArray,
    method: str | Method,
    cache: Path | None = None,
) -> AttackResult:
    """Attack ``images``: find small perturbations that ``classifier`` misclassifies.

    Args:
        classifier: images (B, 3, H, W) in [0, 1] to logits; in eval mode.
        images: uint8 (B, H, W, 3).
        labels: (B,), the true classes.
        method: a key of `METHODS`, or a method with other settings.
        cache: folder for results, in chunks, from which an interrupted run resumes.

    Raises:
        AttackError: foolbox is not installed, or there is no such method.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise AttackError(f"no attack is called {method!r}: there are {', '.join(METHODS)}")
        method = METHODS[method]
    load_foolbox()
    key = fingerprint(classifier, method)
    folded = fast(classifier)
    parts, l2 = [], []
    for start in track(range(0, len(images), _CHUNK), type(method).__name__, f"x{_CHUNK} image"):
        chunk, truth = images[start : start + _CHUNK], labels[start : start + _CHUNK]
        parts.append(cached(cache, key, chunk, truth, partial(_attack_chunk, folded, classifier, chunk, truth, method)))
        l2.append(distances(parts[-1], chunk))
    attacked = np.concatenate(parts)
    return AttackResult(attacked, predict(classifier, attacked) != labels, np.concatenate(l2))


def fingerprint(classifier: nn.Module, method: object) -> str:
    """SHA-256 of all that an attack depends on except the images: the weights of ``classifier`` and the settings."""
    return weights_digest(classifier, repr((method, OVERSHOOTS, MARGIN)))


@torch.no_grad()
def predict(classifier: nn.Module, images: Pixels) -> IntArray:
    """The classes (B,) that ``classifier`` predicts for uint8 (B, H, W, 3)."""
    parts = [classifier(to_float(images[i : i + _CHUNK])).argmax(dim=1) for i in range(0, len(images), _CHUNK)]
    return torch.cat(parts).numpy()


def to_float(images: Pixels) -> Tensor:
    """uint8 (B, H, W, 3) as float32 (B, 3, H, W) in [0, 1], as the pipeline makes it."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(255))


def to_bytes(images: Tensor) -> Pixels:
    """Float (B, 3, H, W) clipped to [0, 1] and rounded to uint8 (B, H, W, 3)."""
    rounded = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(rounded.permute(0, 2, 3, 1).numpy())


def distances(images: Pixels, others: Pixels) -> FloatArray:
    """(B,): the L2 norm of what ``images`` (B, H, W, 3) differ by from ``others``, for pixels from 0 to 1."""
    return (to_float(images) - to_float(others)).flatten(1).norm(dim=1).numpy()


def _attack_chunk(folded: nn.Module, classifier: nn.Module, images: Pixels, labels: IntArray, method: Method) -> Pixels:
    """Attack ``folded``, ``classifier`` with folded batch norms; success is decided by ``classifier`` itself."""
    clean, truth = to_float(images), torch.from_numpy(labels)
    perturbed = method.perturb(folded, clean.contiguous(memory_format=torch.channels_last), truth)
    return _survive_rounding(classifier, clean, perturbed, truth)


@torch.no_grad()
def _survive_rounding(classifier: nn.Module, clean: Tensor, perturbed: Tensor, labels: Tensor) -> Pixels:
    """``perturbed`` as 8-bit images that ``classifier`` still misclassifies; ``clean`` if there is none."""
    result = to_bytes(clean)
    waiting = torch.arange(len(clean))
    for length in OVERSHOOTS:
        candidates = to_bytes(clean[waiting] + length * (perturbed - clean)[waiting])
        fooled = _fooled(classifier, to_float(candidates), labels[waiting], MARGIN)
        result[waiting[fooled].numpy()] = candidates[fooled.numpy()]
        waiting = waiting[~fooled]
        if not len(waiting):
            break
    return result


@torch.no_grad()
def _fooled(classifier: nn.Module, images: Tensor, labels: Tensor, lead: float) -> Tensor:
    """(B,): whether another class leads the true one by more than ``lead`` logits."""
    return margin(classifier(images)[None], labels) < -lead


def _run_foolbox(attack: Any, classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    foolbox = load_foolbox()
    model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=images.device)
    result: Tensor = attack.run(model, images, foolbox.criteria.Misclassification(labels))
    return result.detach()


def load_foolbox() -> Any:
    """Raises AttackError if it is not installed."""
    try:
        return importlib.import_module("foolbox")
    except ImportError:
        raise AttackError("foolbox is not installed: pip install foolbox") from None


def cached(
    folder: Path | None,
    key: str,
    images: Pixels,
    labels: IntArray,
    compute: Callable[[], Pixels],
) -> Pixels:
    """The result of ``compute`` on images (N, H, W, 3), stored in ``folder`` under all that it depends on."""
    if folder is None:
        return compute()
    digest = hashlib.sha256(key.encode() + images.tobytes() + labels.tobytes()).hexdigest()
    file = folder / f"{digest[:32]}.npz"
    with contextlib.suppress(NpzError):  # not there, or damaged
        stored: Pixels = read_npz(file)["images"]
        if stored.shape == images.shape:
            return stored
    result = compute()
    with contextlib.suppress(BlockingIOError):  # another process is writing the same
        write_npz(file, images=result)
    return result
