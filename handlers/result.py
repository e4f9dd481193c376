"""What a purified batch says: votes, mean logits, and how far they agree."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Result:
    """The answer for B images of K purified copies each and C classes.

    Attributes:
        sample_logits: (B, K, C), the logits of every copy.
        copies: the purified images, or what fetches them from where they are; read them as ``purified``.
        unpurified_logits: (B, C), the logits of the images as they came.
        timing_ms: milliseconds spent in each stage, for the whole batch; "noise" is the drawing of it.
    """

    sample_logits: FloatArray
    copies: FloatArray | Callable[[], FloatArray]
    unpurified_logits: FloatArray
    timing_ms: dict[str, float]

    @cached_property
    def purified(self) -> FloatArray:
        """(B, K, 3, H, W): nominally in [0, 1]; a generator may overshoot a little."""
        return self.copies() if callable(self.copies) else self.copies

    @cached_property
    def logits(self) -> FloatArray:
        """(B, C): mean over the copies."""
        mean: FloatArray = self.sample_logits.mean(axis=1)
        return mean

    @cached_property
    def sample_labels(self) -> IntArray:
        """(B, K): the class each copy votes for."""
        labels: IntArray = self.sample_logits.argmax(axis=2)
        return labels

    @cached_property
    def votes(self) -> IntArray:
        """(B, C): copies that vote for each class; a row sums to K."""
        classes = np.arange(self.sample_logits.shape[2])
        counts: IntArray = (self.sample_labels[:, :, None] == classes).sum(axis=1)
        return counts

    @cached_property
    def ranking(self) -> IntArray:
        """(B, C): classes from best to worst, by votes; equal votes are ordered by the mean logits."""
        return np.lexsort((-self.logits, -self.votes), axis=1)

    @property
    def labels(self) -> IntArray:
        """(B,): the class with most votes."""
        return self.ranking[:, 0]

    @property
    def unpurified_labels(self) -> IntArray:
        """(B,): the class of the images as they came."""
        labels: IntArray = self.unpurified_logits.argmax(axis=1)
        return labels

    @property
    def agreement(self) -> FloatArray:
        """(B,): share of the copies that vote for the label, above 0 and up to 1."""
        won: IntArray = self.votes.max(axis=1)
        share: FloatArray = (won / self.sample_logits.shape[1]).astype(np.float32)
        return share

    @property
    def flagged(self) -> npt.NDArray[np.bool_]:
        """(B,): purification changed the label, as it does for most adversarial images."""
        changed: npt.NDArray[np.bool_] = self.labels != self.unpurified_labels
        return changed

    @cached_property
    def confidences(self) -> FloatArray:
        """(B, C): softmax of the mean logits."""
        return softmax(self.logits)

    @cached_property
    def unpurified_confidences(self) -> FloatArray:
        """(B, C): softmax of the unpurified logits."""
        return softmax(self.unpurified_logits)

    def representative(self, item: int) -> FloatArray:
        """(3, H, W): the first purified copy of an image that votes for its label."""
        copy = int((self.sample_labels[item] == self.labels[item]).argmax())
        chosen: FloatArray = self.purified[item, copy]
        return chosen


def softmax(logits: FloatArray) -> FloatArray:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: FloatArray = powers / powers.sum(axis=-1, keepdims=True)
    return shares
