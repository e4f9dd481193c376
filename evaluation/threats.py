"""Threats: what an attacker knows, may change, and spends."""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from evaluation import changes
from evaluation.adaptive import AscentResult, Effort, Forward, Penalty, Trace, ascend, examine, in_precision
from evaluation.attacks import attack, cached, distances, fingerprint, load_foolbox, predict, to_bytes, to_float
from evaluation.changes import Change
from evaluation.defences import Defence, Predictions, Subject, gaussian
from evaluation.photographs import to_pixels
from export.fold import fast
from handlers.arrays import IntArray, Pixels
from handlers.certify import certify

Record = dict[str, Any]
"""What a threat found on a chunk of images, as JSON: lists with an entry per image, and what the caveats need."""

COLUMNS = ("right", "unanimous", "flagged", "agreement", "score", "deviation", "l2")
"""Its lists, for all threats that send images."""

FLAT = 0.9
"""Two gradients agree that have this cosine: more draws of the noise would hardly change them."""
_EXAMINED = 16  # images whose gradients tell so
_TINY = 1e-30  # of a probability, so that its logarithm is finite
_ENGINE_TRIES = 1000  # the first of the tries that an attacker makes on the way
_SHORT = 10  # steps of the first ascent
_BALL, _EFFORT = changes.L2(0.5), Effort()
TRY = 1_000_003
"""Seeds of a further try at the same image are this far away."""


@dataclass(frozen=True)
class Target:
    """A defence, with the images that it is attacked on.

    Attributes:
        images: uint8 (N, H, W, 3).
        labels: (N,), their true classes.
        first: number of the first of them among all images; chooses the noise.
        cache: folder for attacks that know the classifier alone.
        rows: (N,), how far each stands after the first; None where all follow one another.
    """

    subject: Subject
    defence: Defence
    images: Pixels
    labels: IntArray
    first: int = 0
    cache: Path | None = None
    rows: IntArray | None = None

    @property
    def places(self) -> IntArray:
        """(N,), the number of each among all images."""
        return self.first + (np.arange(len(self.images)) if self.rows is None else self.rows)

    def only(self, rows: IntArray) -> "Target":
        """The images in these ``rows``, which keep their noise."""
        rows_of = (self.places - self.first)[rows]
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows], rows=rows_of)

    def predict(self, images: Pixels, attempt: int = 0, rows: Any = slice(None)) -> Predictions:
        """What the defence makes of ``images``, which stand in these ``rows``, at a further ``attempt``."""
        return self.defence.serve(images, [int(place) + attempt * TRY for place in self.places[rows]])

    def record(self, images: Pixels, found: Predictions | None = None, **more: Any) -> Record:
        """What is kept of the answers to ``images``."""
        found = self.predict(images) if found is None else found
        voters, labels = found.sample_labels, self.labels
        columns = (
            found.labels == labels,
            ((voters == labels[:, None]) | (voters < 0)).all(axis=1),
            found.flagged,
            found.agreement,
            found.scores,
            found.deviation,
            distances(images, self.images),
        )
        return {**{name: _to_list(column) for name, column in zip(COLUMNS, columns, strict=True)}, **more}


@dataclass(frozen=True)
class Threat(ABC):
    """One column.

    Attributes:
        title: as the report says it; with the other fields, all settings.
        knows: "nothing" of the models, "classifier" or "defence"; "" for a threat that is no attack and does not count
            for the worst.
        is_costly: whether it takes hundreds of answers per image.
        meets_all: whether it is wanted for its scores, so also on images that other attacks have broken.
    """

    title: str
    knows: ClassVar[str] = ""
    is_costly: ClassVar[bool] = False
    meets_all: ClassVar[bool] = False

    def check(self) -> None:  # noqa: B027
        """Raises AttackError where a library is missing that `run` needs: before hours of work, not after."""

    @abstractmethod
    def run(self, target: Target) -> Record:
        """Attack the images of ``target``."""


@dataclass(frozen=True)
class Clean(Threat):
    """The images as they are, or behind Gaussian noise of standard deviation ``sigma``."""

    sigma: float = 0.0

    def run(self, target: Target) -> Record:
        images = target.images
        if self.sigma:
            return target.record(gaussian(images, self.sigma, target.places.tolist()))
        found = target.predict(images)
        if target.defence.name != "none":
            return target.record(images, found)
        return target.record(images, found, agrees=_to_list(predict(target.subject.classifier, images) == found.labels))


@dataclass(frozen=True)
class Transferred(Threat):
    """Images that fool the classifier alone, found without the defence; sent ``tries`` times, each with fresh noise.

    Attributes:
        method: one of `evaluation.attacks.METHODS`, or "" for Auto-PGD with ``change`` and ``effort``.
    """

    knows: ClassVar[str] = "classifier"
    method: str = ""
    change: Change = _BALL
    effort: Effort = _EFFORT
    tries: int = 1

    def check(self) -> None:
        if self.method:
            load_foolbox()

    def run(self, target: Target) -> Record:
        images = self._attacked(target)
        found = target.predict(images)
        for attempt in range(1, self.tries if target.defence.is_random else 1):
            resisting = np.flatnonzero(found.labels == target.labels)
            if not len(resisting):
                break
            found = _replace(found, target.predict(images[resisting], attempt, resisting), resisting)
        return target.record(images, found)

    def _attacked(self, target: Target) -> Pixels:
        classifier = target.defence.classifier or target.subject.classifier
        if self.method:
            return attack(classifier, target.images, target.labels, self.method, target.cache).images

        def compute() -> Pixels:
            clean, labels = to_float(target.images), torch.from_numpy(target.labels)
            best: AscentResult | None = None
            device = target.subject.device
            forward = in_precision(_of_classifier(fast(classifier, device), device), self.effort, device)
            for attempt in range(self.effort.restarts):
                found = ascend(forward, clean, labels, self.change, self.effort, attempt, target.first)
                best = found if best is None else _best_of(best, found)
            assert best is not None
            return to_bytes(best.images)

        key = fingerprint(classifier, (self.change, self.effort, target.first))
        return cached(target.cache, key, target.images, target.labels, compute)


@dataclass(frozen=True)
class White(Threat):
    """Gradients through the whole defence; what comes out is rounded to 8 bits and judged by the served engines.

    Each ascent begins anew on the images that the engines, with fresh noise, still classify correctly.
    """

    is_costly: ClassVar[bool] = True
    knows: ClassVar[str] = "defence"
    knows_noise: ClassVar[bool] = False
    change: Change = _BALL
    effort: Effort = _EFFORT

    def run(self, target: Target) -> Record:
        torch.manual_seed(target.first)  # of the noise that the gradients are averaged over
        clean, labels = to_float(target.images), torch.from_numpy(target.labels)
        effort, gradients = self._enough_draws(target, clean, labels)
        images, found = target.images.copy(), target.predict(target.images)
        resisting = np.flatnonzero(found.labels == target.labels)
        broken, late = [], 0
        penalty = self.penalty(target)
        short = [] if penalty else _short_ascent(effort)
        for attempt, each in enumerate([*short, *[effort] * effort.restarts]):
            if not len(resisting):
                break
            forward = in_precision(self.forward(target, resisting), effort, target.subject.device)
            some = clean[resisting], labels[resisting]
            got = ascend(forward, *some, self.change, each, attempt, target.first, penalty)
            changed = to_bytes(got.images)
            answers = target.predict(changed, 0 if self.knows_noise else attempt, resisting)
            images[resisting], found = changed, _replace(found, answers, resisting)
            if each is effort:
                late += int(((got.margins < 0) & (got.earlier >= 0)).sum())
            fell = answers.labels != target.labels[resisting]
            broken.append(int(fell.sum()))
            resisting = resisting[~fell]
        return target.record(images, found, draws=effort.draws, broken=broken, late=late, gradients=gradients)

    def forward(self, target: Target, rows: IntArray) -> Forward:
        """What this attacker computes of the images in these ``rows``."""
        return target.defence.forward

    def penalty(self, target: Target) -> Penalty | None:
        """What this attacker keeps low besides."""
        return None

    def _enough_draws(self, target: Target, clean: Tensor, labels: Tensor) -> tuple[Effort, Record]:
        """As many draws as make two gradients agree, but not more than the budget has; and how they look then."""
        some, truth = clean[:_EXAMINED], labels[:_EXAMINED]
        draws = self.effort.draws if self.knows_noise else 1
        forward = in_precision(self.forward(target, np.arange(len(some))), self.effort, target.subject.device)
        seen = examine(forward, some, truth, draws)
        while target.defence.is_random and seen.cosine < FLAT and draws < self.effort.draws:
            draws = min(2 * draws, self.effort.draws)
            seen = examine(forward, some, truth, draws)
        return dataclasses.replace(self.effort, draws=draws), dataclasses.asdict(seen)


@dataclass(frozen=True)
class Quiet(White):
    """The same by an attacker who knows the attack score (`handlers.result.Result.scores`) and keeps it low."""

    knows: ClassVar[str] = "defence, score"
    meets_all: ClassVar[bool] = True

    def penalty(self, target: Target) -> Penalty:
        """The score."""
        subject = target.subject
        own = target.defence.classifier
        alone = _of_classifier(subject.fast_classifier if own is None else fast(own, subject.device), subject.device)

        def score(images: Tensor, logits: Tensor) -> Tensor:
            before, labels = alone(images, 1).logits[0].log_softmax(dim=1).topk(2)
            after = logits.softmax(dim=2).mean(dim=0)
            left = after.gather(1, labels[:, :1])[:, 0].clamp_min(_TINY).log()
            drop = ((before[:, 0] - left) * after.amax(dim=1)).clamp_min(0)
            return drop + (before[:, 1] - before[:, 0]).exp()

        return score


@dataclass(frozen=True)
class Seeded(White):
    """The same where a client may choose the seed: always the same noise, which the attacker computes as well."""

    knows: ClassVar[str] = "defence, noise"
    knows_noise: ClassVar[bool] = True

    def forward(self, target: Target, rows: IntArray) -> Forward:
        if (seeded := target.defence.seeded) is None:
            return target.defence.forward
        seeds = target.places[rows].tolist()
        return lambda images, draws: seeded(images, draws, seeds)


@dataclass(frozen=True)
class Engine(White):
    """The same, but the served engines decide how good an image is; the reference says only where to go from it."""

    def forward(self, target: Target, rows: IntArray) -> Forward:
        asked = 0

        def forward(images: Tensor, draws: int) -> Trace:
            nonlocal asked
            asked += 1
            seeds = [int(place) + (asked + _ENGINE_TRIES) * TRY for place in target.places[rows]]
            served = target.defence.serve(to_bytes(images), seeds).logits
            trace = target.defence.forward(images, draws)
            off = torch.from_numpy(served) - trace.logits.mean(dim=0)
            return Trace(trace.logits + off.detach(), trace.stages)

        return forward


@dataclass(frozen=True)
class Certified(Threat):
    """No attack: the class that wins under noise, and within which radius that is proven (`handlers.certify`)."""

    is_costly: ClassVar[bool] = True
    sigma: float = 0.25
    draws: int = 100
    alpha: float = 0.001
    batch: int = 256

    def run(self, target: Target) -> Record:
        asked, classes = 0, len(target.subject.pipeline.manifest.classes)

        def classify(noisy: Any) -> Any:
            nonlocal asked
            asked += 1
            pixels = to_pixels(noisy.transpose(0, 2, 3, 1))
            seeds = [asked * TRY + target.first + i for i in range(len(pixels))]
            return target.defence.serve(pixels, seeds).labels

        images = to_float(target.images).numpy()
        found = certify(classify, images, classes, self.sigma, self.draws, self.alpha, self.batch)
        voted = found.counts.argmax(axis=1) == target.labels
        right = np.where(found.labels == target.labels, found.radii, 0.0)
        return {"right": _to_list(voted), "radius": _to_list(right)}


def _short_ascent(effort: Effort) -> list[Effort]:
    """A short ascent before long ones: most images fall to it, and the long ones need not be taken on them."""
    if effort.steps < 2 * _SHORT:
        return []
    return [dataclasses.replace(effort, steps=_SHORT, draws=-(-effort.draws // 4))]


def _of_classifier(classifier: torch.nn.Module, device: str) -> Forward:
    return lambda images, _: Trace(classifier(images.to(device))[None].cpu())


def _best_of(one: AscentResult, other: AscentResult) -> AscentResult:
    wins = other.margins < one.margins
    images = torch.where(wins[:, None, None, None], other.images, one.images)
    return AscentResult(images, torch.minimum(one.margins, other.margins), torch.minimum(one.earlier, other.earlier))


def _replace(found: Predictions, other: Predictions, rows: IntArray) -> Predictions:
    """``found``, but in these ``rows`` what ``other`` says."""
    columns = {}
    for entry in dataclasses.fields(Predictions):
        old, new = getattr(found, entry.name), getattr(other, entry.name)
        if entry.name == "sample_labels":  # "auto" draws more samples of some
            most = max(old.shape[1], new.shape[1])
            old, new = (np.pad(a, ((0, 0), (0, most - a.shape[1])), constant_values=-1) for a in (old, new))
        columns[entry.name] = changed = old.copy()
        changed[rows] = new
    return Predictions(**columns)


def _to_list(column: Any) -> list[Any]:
    return (column.round(5) if column.dtype.kind == "f" else column.astype(int)).tolist()
