"""Attacks that only ask, by the Adversarial Robustness Toolbox (ART)."""

import contextlib
import importlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from evaluation.attacks import AttackError, distances
from evaluation.defences import Predictions
from evaluation.photographs import to_pixels
from evaluation.threats import TRY, Record, Target, Threat
from handlers.arrays import Pixels


class _Spent(Exception):
    """An attack has asked as often as it may."""


@dataclass(frozen=True)
class BlackBox(Threat):
    """An attack of ART that only asks, at most ``queries`` times per image, each time with fresh noise."""

    is_costly: ClassVar[bool] = True
    knows: ClassVar[str] = "nothing"
    queries: int = 500

    def check(self) -> None:
        _evasion()

    def run(self, target: Target) -> Record:
        np.random.seed(target.first)  # ART draws from there
        images, sent = self.search(target)
        return target.record(images, target.predict(images, 1), queries=sent)

    @abstractmethod
    def search(self, target: Target) -> tuple[Pixels, int]:
        """What it has made of the images, and how often it has asked for the image that took most."""

    def box(self, target: Target, look: Callable[[Pixels, Predictions], object]) -> Any:
        """ART's estimator for the defence; ``look`` is shown every batch and its answers."""
        from evaluation.art import black_box

        asked, manifest = 0, target.subject.pipeline.manifest

        def predict(images: Any) -> Any:
            nonlocal asked
            pixels = to_pixels(images)
            seeds = [(asked + 1 + i // len(target.images)) * TRY + target.first + i for i in range(len(pixels))]
            found = target.defence.serve(pixels, seeds)
            asked += -(-len(pixels) // len(target.images))
            look(pixels, found)
            return found.logits

        return black_box(predict, manifest.image_size, len(manifest.classes))


@dataclass(frozen=True)
class Square(BlackBox):
    """The Square attack (Andriushchenko et al., ECCV 2020) in Linf."""

    size: float = 4 / 255

    def search(self, target: Target) -> tuple[Pixels, int]:
        batches: list[Pixels] = []
        square = _evasion().SquareAttack(
            self.box(target, lambda images, _: batches.append(images)),
            norm=np.inf,
            eps=self.size,
            max_iter=self.queries,
            p_init=0.3,
            batch_size=len(target.images),
            verbose=False,
        )
        found = square.generate((target.images / 255).astype(np.float32), target.labels)
        return to_pixels(found), len(batches)


@dataclass(frozen=True)
class HopSkipJump(BlackBox):
    """HopSkipJump (Chen, Jordan and Wainwright, IEEE S&P 2020): it needs the label alone, and walks along the boundary.

    What is sent is the nearest image that was misclassified, if only once: the noise then is another.
    """

    def search(self, target: Target) -> tuple[Pixels, int]:
        images, most = target.images.copy(), 0
        for row in np.flatnonzero(target.predict(target.images).labels == target.labels):
            images[row], sent = self._nearest(target.only(np.array([row])))
            most = max(most, sent)
        return images, most

    def _nearest(self, target: Target) -> tuple[Pixels, int]:
        nearest, distance, sent = target.images[0], np.inf, 0

        def look(images: Pixels, found: Predictions) -> None:
            nonlocal nearest, distance, sent
            sent += len(images)
            far = distances(images, target.images)
            far[found.labels == target.labels] = np.inf
            if far[least := int(far.argmin())] < distance:
                nearest, distance = images[least], far[least]
            if sent >= self.queries:
                raise _Spent

        hop = _evasion().HopSkipJump(
            self.box(target, look),
            batch_size=max(1, self.queries // 20),
            max_iter=self.queries,
            init_eval=max(2, self.queries // 20),
            verbose=False,
        )
        pixels = (target.images / 255).astype(np.float32)
        start = np.random.default_rng(int(target.places[0])).random(pixels.shape, np.float32)
        with contextlib.suppress(_Spent):
            hop.generate(pixels, target.labels, x_adv_init=start)
        return nearest, sent


def _evasion() -> Any:
    try:
        return importlib.import_module("art.attacks.evasion")
    except ImportError:
        raise AttackError("ART is not installed: pip install adversarial-robustness-toolbox") from None
