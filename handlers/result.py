"""The result of a pipeline run: votes, mean logits, agreement of the samples, and attack scores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from handlers.arrays import BoolArray, FloatArray, IntArray

_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Result:
    """The result for B images with up to K purified samples each, and C classes.

    Attributes:
        sample_logits: (B, K, C), the logits of every sample; NaN from ``samples[b]`` on.
        images: the purified images, or a function that copies them from their device; use ``purified``.
        unpurified_logits: (B, C), the logits of the unpurified images.
        timing_ms: milliseconds spent in each stage for the whole batch; "noise" is the time to draw it.
    """

    sample_logits: FloatArray
    images: FloatArray | Callable[[], FloatArray]
    unpurified_logits: FloatArray
    timing_ms: dict[str, float]

    @cached_property
    def purified(self) -> FloatArray:
        """(B, K, 3, H, W), about in [0, 1]: generators may overshoot a little. NaN from ``samples[b]`` on."""
        return self.images() if callable(self.images) else self.images

    @cached_property
    def samples(self) -> IntArray:
        """(B,): number of samples of each image: K, or with "auto" as many as its vote needed."""
        return self._is_drawn.sum(axis=1)

    @cached_property
    def logits(self) -> FloatArray:
        """(B, C): mean over the samples."""
        return self._mean(self.sample_logits)

    @cached_property
    def sample_labels(self) -> IntArray:
        """(B, K): the class that each sample votes for; -1 from ``samples[b]`` on."""
        labels: IntArray = self.sample_logits.argmax(axis=2)
        return labels if self._all_are_drawn else np.where(self._is_drawn, labels, -1)

    @cached_property
    def votes(self) -> IntArray:
        """(B, C): number of votes for each class; row b sums to ``samples[b]``."""
        classes = np.arange(self.sample_logits.shape[2])
        return (self.sample_labels[:, :, None] == classes).sum(axis=1)

    @cached_property
    def ranking(self) -> IntArray:
        """(B, C): classes by number of votes, the best first; ties are broken by the mean logits."""
        return np.lexsort((-self.logits, -self.votes), axis=1)

    @cached_property
    def labels(self) -> IntArray:
        """(B,): the class with most votes."""
        return self.ranking[:, 0]

    @cached_property
    def unpurified_labels(self) -> IntArray:
        """(B,): the class of the unpurified image."""
        return self.unpurified_logits.argmax(axis=1)

    @cached_property
    def agreement(self) -> FloatArray:
        """(B,): share of the samples that vote for the label, in (0, 1]."""
        won: IntArray = self.votes.max(axis=1)
        return (won / self.samples).astype(np.float32)

    @cached_property
    def flagged(self) -> BoolArray:
        """(B,): purification changed the label, as it does for most adversarial images."""
        return self.labels != self.unpurified_labels

    @cached_property
    def scores(self) -> FloatArray:
        """(B,): attack score, 0 or more: how far purification moves the answer, and how near another one was before it.

        The first is by how many nats purification lowers the probability of the label that the unpurified image has,
        times the largest probability after it. So it is large where one sure answer takes the place of another, as
        with an attack. A clean image that purification blurs beyond recognition loses its answer too, but gets no
        sure one. The second, from 0 to 1, is the ratio of the two largest probabilities of the unpurified image: an
        attack that changes as little as it can stops right behind the border between two classes.
        """
        before, after = self.unpurified_confidences, self._mean(softmax(self.sample_logits))
        left = after[np.arange(len(after)), self.unpurified_labels]
        second, first = np.partition(before, -2, axis=1)[:, -2:].T
        drop: FloatArray = np.log(np.maximum(first, _TINY) / np.maximum(left, _TINY)) * after.max(axis=1)
        return np.maximum(drop, 0) + second / first

    @cached_property
    def confidences(self) -> FloatArray:
        """(B, C): softmax of the mean logits."""
        return softmax(self.logits)

    @cached_property
    def unpurified_confidences(self) -> FloatArray:
        """(B, C): softmax of the unpurified logits."""
        return softmax(self.unpurified_logits)

    def representative(self, item: int) -> FloatArray:
        """(3, H, W): the first purified sample of an image that votes for its label."""
        first = int((self.sample_labels[item] == self.labels[item]).argmax())
        return self.purified[item, first]

    @cached_property
    def _is_drawn(self) -> BoolArray:
        return ~np.isnan(self.sample_logits[:, :, 0])

    @cached_property
    def _all_are_drawn(self) -> bool:
        return bool(self._is_drawn.all())

    def _mean(self, values: FloatArray) -> FloatArray:
        """(B, C): the mean of (B, K, C) over the samples that were drawn."""
        if not self._all_are_drawn:
            values = np.where(self._is_drawn[:, :, None], values, 0)
        return values.sum(axis=1) / self.samples[:, None].astype(np.float32)


def softmax(logits: FloatArray) -> FloatArray:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
