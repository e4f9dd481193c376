"""When the vote of an image is decided: the sequential test for ``samples="auto"``.

An image gets two samples, then four, eight and so on up to the maximum M, until the probability that all M samples
would give another label than the leading class is at most `RISK`. This is the problem of auditing an election from a
part of the votes: the final number of votes of the leader, m of M, has a prior, and the votes so far are drawn from all
M without replacement (Rivest and Shen, "A Bayesian Method for Auditing Elections", EVT/WOTE 2012; the same rule with an
unbounded number of samples is Adaptive-Consistency, Aggarwal et al., EMNLP 2023, arXiv:2305.11860).

The prior: with probability w the samples can disagree, and every m from 0 to M is equally likely; otherwise they are
unanimous. w is the probability of the other classes in the mean softmax of the samples, and at least `LEAST_OPEN`. So
two confident samples are enough, while of samples without any confidence eight of 32 must agree. After the first vote
against the leader only the uniform prior counts. A leader that cannot be overtaken has won in any case.

The guarantee depends on the prior. ``mlvgm bench vote`` measures on images how often the label is that of all M
samples.
"""

from functools import cache
from math import comb

import numpy as np

from handlers.arrays import BoolArray, FloatArray
from handlers.result import softmax

RISK = 0.001
"""Accepted probability that more samples would change the label."""

LEAST_OPEN = 0.01
"""Smallest prior probability that the samples of an image can disagree."""

FIRST = 2
"""Number of samples before the first decision."""


def rounds(most: int) -> list[int]:
    """Number of samples of an image after each round: 2, 4, 8 and so on, up to ``most``."""
    return [*(FIRST << i for i in range(most.bit_length()) if FIRST << i < most), most]


def decided(sample_logits: FloatArray, most: int) -> BoolArray:
    """(B,): whether ``sample_logits`` (B, t, C) determine the label of ``most`` samples, up to `RISK`."""
    count, drawn, classes = sample_logits.shape
    votes = (sample_logits.argmax(axis=2)[:, :, None] == np.arange(classes)).sum(axis=1)
    leaders = votes.argmax(axis=1)
    confidences = softmax(sample_logits).mean(axis=1)[np.arange(count), leaders]
    runners_up = np.partition(votes, -2, axis=1)[:, -2]
    images = zip(votes.max(axis=1).tolist(), runners_up.tolist(), confidences.tolist(), strict=True)
    return np.array(
        [
            lead > second + most - drawn or _risk(lead, drawn, most, 1 - confidence) <= RISK
            for lead, second, confidence in images
        ]
    )


def _risk(lead: int, drawn: int, most: int, doubt: float) -> float:
    """The probability that the leader, with ``lead`` of ``drawn`` votes, gets no majority of ``most`` votes.

    Args:
        doubt: probability of the other classes in the mean softmax.
    """
    can_disagree = max(doubt, LEAST_OPEN)
    if lead == drawn:  # 1 / (drawn + 1): the likelihood if every tally is equally likely
        split = can_disagree / (drawn + 1)
        can_disagree = split / (split + (1 - can_disagree) / 2)
    else:
        can_disagree = 1.0
    return can_disagree * overturned(lead, drawn, most)


@cache
def overturned(lead: int, drawn: int, most: int) -> float:
    """The probability that a class with ``lead`` of ``drawn`` votes gets at most half of all ``most`` votes.

    With a uniform prior of the final tally: a sum of hypergeometric likelihoods, computed exactly in integers.
    """
    other = drawn - lead
    lost = sum(comb(tally, lead) * comb(most - tally, other) for tally in range(lead, most // 2 + 1))
    return lost / comb(most + 1, drawn + 1)
