"""When the vote of an image is decided: the sequential test behind ``samples="auto"``.

An image gets two samples, then as many again, and so on up to the maximum M, until the probability that the label of
all M samples would be another one than the leader's is at most `RISK`. The samples drawn first are the same M samples,
so this is a question about a tally that has been counted in part, as in the audit of an election: the final tally of
the leader, m of M, gets a prior, and the votes counted so far, in random order, are a draw from it without
replacement (Rivest and Shen, "A Bayesian Method for Auditing Elections", EVT/WOTE 2012; the same rule with an unbounded
number of samples is Adaptive-Consistency, Aggarwal et al., EMNLP 2023, arXiv:2305.11860).

The prior: with probability w the samples can disagree, and every tally from 0 to M is equally likely; otherwise they
are unanimous. w is what the mean softmax of the samples leaves to the other classes, and `LEAST_OPEN` at least. So two
samples are enough where both are sure, and unanimous ones that are as unsure as can be must be eight of 32. After the
first vote against the leader the uniform prior alone decides. A leader that cannot be overtaken has won in any case.

What the rule promises rests on the prior. ``mlvgm bench vote`` measures on images how often its label is that of all M.
"""

from functools import cache
from math import comb

import numpy as np
import numpy.typing as npt

from handlers.result import softmax

RISK = 0.001
"""Accepted probability that more samples would have changed the label."""

LEAST_OPEN = 0.01
"""The least prior probability that the samples of an image can disagree."""

FIRST = 2
"""Samples before the first decision."""

FloatArray = npt.NDArray[np.float32]


def rounds(most: int) -> list[int]:
    """Samples that an image has after each round: 2, 4, 8 and so on, and ``most`` in the end."""
    return [*(FIRST << i for i in range(most.bit_length()) if FIRST << i < most), most]


def decided(sample_logits: FloatArray, most: int) -> npt.NDArray[np.bool_]:
    """(B,): whether the label of ``most`` samples is known well enough from these ``sample_logits`` (B, t, C)."""
    count, drawn, classes = sample_logits.shape
    votes = (sample_logits.argmax(axis=2)[:, :, None] == np.arange(classes)).sum(axis=1)
    leaders = votes.argmax(axis=1)
    confidences = softmax(sample_logits).mean(axis=1)[np.arange(count), leaders]
    runners_up = np.partition(votes, -2, axis=1)[:, -2]
    return np.array(
        [
            _unassailable(lead, second, drawn, most) or _risk(lead, drawn, most, 1 - confidence) <= RISK
            for lead, second, confidence in zip(
                votes.max(axis=1).tolist(), runners_up.tolist(), confidences.tolist(), strict=True
            )
        ]
    )


def _unassailable(lead: int, second: int, drawn: int, most: int) -> bool:
    return lead > second + most - drawn


def _risk(lead: int, drawn: int, most: int, doubt: float) -> float:
    """The probability that the leader of ``drawn`` samples, with ``lead`` of them, gets no majority of ``most``.

    Args:
        doubt: what the mean softmax leaves to the other classes.
    """
    can_disagree = max(doubt, LEAST_OPEN)
    if lead == drawn:  # 1 / (drawn + 1): how likely that is when every tally is equally likely
        split = can_disagree / (drawn + 1)
        can_disagree = split / (split + (1 - can_disagree) / 2)
    else:
        can_disagree = 1.0
    return can_disagree * overturned(lead, drawn, most)


@cache
def overturned(lead: int, drawn: int, most: int) -> float:
    """The probability that a class with ``lead`` of ``drawn`` votes gets at most half of ``most`` in the end.

    Every final tally is equally likely beforehand: the sum of hypergeometric likelihoods, which is exact in integers.
    """
    other = drawn - lead
    lost = sum(comb(tally, lead) * comb(most - tally, other) for tally in range(lead, most // 2 + 1))
    return lost / comb(most + 1, drawn + 1)
