from itertools import combinations, pairwise
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.result import Result
from handlers.vote import FIRST, LEAST_OPEN, RISK, decided, overturned, rounds

SURE = 20.0


def sample_logits(labels: np.ndarray, confidence: float = SURE, classes: int = 3) -> np.ndarray:
    """Logits (B, K, C) of samples that vote for ``labels`` (B, K)."""
    one_hot: np.ndarray = np.eye(classes, dtype=np.float32)[labels] * np.float32(confidence)
    return one_hot


def label_of(logits: np.ndarray) -> int:
    return int(Result(logits[None], np.empty(0, np.float32), logits[None, 0], {}).labels[0])


def stopped_at(logits: np.ndarray) -> int:
    """How many of the samples (M, C) of an image are drawn."""
    return next(t for t in rounds(len(logits)) if t == len(logits) or decided(logits[None, :t], len(logits))[0])


@pytest.mark.parametrize("most", range(1, 70))
def test_rounds_double_up_to_the_maximum(most: int) -> None:
    found = rounds(most)
    assert found[-1] == most
    assert found[0] == min(FIRST, most)
    assert all(before < after <= 2 * before for before, after in pairwise(found))


def test_two_samples_are_enough_where_they_are_sure_and_agree() -> None:
    agree, differ = (sample_logits(np.array([labels])) for labels in ([1, 1], [1, 2]))
    assert decided(agree, 32)[0]
    assert not decided(differ, 32)[0]


def test_samples_that_are_not_sure_must_agree_more_often() -> None:
    unsure = sample_logits(np.ones((1, 32), int), confidence=0.5)
    needed = [t for t in range(2, 33) if decided(unsure[:, :t], 32)[0]]
    assert needed == list(range(needed[0], 33)), "what is decided stays so when they go on to agree"
    assert 4 < needed[0] <= 8


@given(st.integers(1, 40).flatmap(lambda most: st.tuples(st.just(most), st.integers(1, most))), st.data())
def test_the_probability_of_an_overturn_is_that_of_an_urn(sizes: tuple[int, int], data: st.DataObject) -> None:
    """Drawn vote by vote: a uniform prior over tallies is Laplace's rule of succession."""
    most, drawn = sizes
    lead = data.draw(st.integers(0, drawn))
    tallies = {lead: 1.0}
    for t in range(drawn, most):
        after: dict[int, float] = {}
        for tally, probability in tallies.items():
            gains = (tally + 1) / (t + 2)
            after[tally + 1] = after.get(tally + 1, 0) + probability * gains
            after[tally] = after.get(tally, 0) + probability * (1 - gains)
        tallies = after
    expected = sum(probability for tally, probability in tallies.items() if tally <= most // 2)
    assert overturned(lead, drawn, most) == pytest.approx(expected, abs=1e-12)


def test_every_order_of_a_final_tally_is_equally_likely() -> None:
    """By counting all orders of six votes: how often is a class that got two of the first three left with half?"""
    lost = seen = 0.0
    for tally in range(7):
        orders = list(combinations(range(6), tally))
        like = [order for order in orders if sum(place < 3 for place in order) == 2]
        seen += len(like) / comb(6, tally)
        lost += (tally <= 3) * len(like) / comb(6, tally)
    assert overturned(2, 3, 6) == pytest.approx(lost / seen)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=24), st.data())
def test_a_lead_that_cannot_be_overtaken_ends_the_vote_with_the_final_label(
    labels: list[int], data: st.DataObject
) -> None:
    most = len(labels)
    logits = sample_logits(np.array(labels), confidence=data.draw(st.floats(0.01, 20)))
    drawn = data.draw(st.integers(1, most))
    votes = np.bincount(labels[:drawn], minlength=3)
    second, first = np.sort(votes)[-2:]
    if first - second > most - drawn:
        assert decided(logits[None, :drawn], most)[0]
        assert label_of(logits[:drawn]) == label_of(logits)


@given(st.integers(0, 2**32 - 1))
def test_an_image_is_decided_by_its_own_samples(seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (6, 4, 3)).astype(np.float32)
    logits[::2, :, 1] += 9
    together = decided(logits, 32)
    assert together.tolist() == [bool(decided(logits[i : i + 1], 32)[0]) for i in range(6)]


def test_the_label_is_that_of_the_maximum_as_often_as_the_rule_says() -> None:
    """Images as the prior has them: some can disagree, each tally equally likely; samples say how unsure they are."""
    rng = np.random.default_rng(0)
    most, images, wrong, drawn = 32, 1500, 0, []
    for confidence, can_disagree in ((0.999, LEAST_OPEN), (0.9, 0.1), (0.6, 0.4)):
        logit = float(np.log(2 * confidence / (1 - confidence)))  # of three classes
        for _ in range(images):
            tally = rng.integers(0, most + 1) if rng.random() < can_disagree else most * rng.integers(0, 2)
            votes = rng.permutation(np.arange(most) < tally).astype(int)
            logits = sample_logits(votes, logit)
            drawn.append(stopped_at(logits))
            wrong += label_of(logits[: drawn[-1]]) != label_of(logits)
    assert wrong <= 3 * images * 3 * RISK, "three times what is expected at most: less likely than one in 10,000"
    assert np.mean(drawn) < most / 3
