import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.errors import InputError
from handlers.score import ScoreThreshold


@given(st.integers(99, 2000), st.floats(0.01, 0.5), st.integers(0, 2**32 - 1))
def test_no_more_of_the_calibration_images_are_suspicious_than_allowed(n: int, rate: float, seed: int) -> None:
    scores = np.random.default_rng(seed).exponential(size=n)
    found = ScoreThreshold.of(scores, rate)
    above = int((scores > found.threshold).sum())
    assert above <= rate * (n + 1)
    assert above + 2 > rate * (n + 1) - 1e-6, "with one more, further images would be above it too often"
    assert found.low < rate < found.high


def test_the_rate_on_further_images_is_the_one_that_was_asked_for() -> None:
    rng = np.random.default_rng(0)
    rates, inside = [], 0
    for _ in range(400):
        found = ScoreThreshold.of(rng.exponential(size=300), 0.05)
        rates.append(float(np.exp(-found.threshold)))  # of scores that are exponential
        inside += found.low <= rates[-1] <= found.high
    assert np.mean(rates) == pytest.approx(0.05, abs=0.002)
    assert 0.92 < inside / 400 < 0.98


def test_the_interval_is_that_of_a_beta_distribution() -> None:
    stats = pytest.importorskip("scipy.stats")
    found = ScoreThreshold.of(np.arange(1000.0), 0.01)
    assert found.threshold == 990  # the 991st
    assert (found.low, found.high) == pytest.approx(stats.beta.interval(0.95, 10, 991), rel=1e-6)


def test_ties_raise_no_false_alarm() -> None:
    scores = np.array([0.0] * 990 + [1.0] * 10)
    assert ScoreThreshold.of(scores, 0.05).threshold == 0
    assert (scores > ScoreThreshold.of(scores, 0.01).threshold).mean() <= 0.01


@pytest.mark.parametrize(
    ("n", "rate", "reason"),
    [
        (98, 0.01, "needs 99 clean images, not 98"),
        (0, 0.5, "needs 1 clean"),
        (100, 0.0, "0 and 1"),
        (100, 1.0, "0 and 1"),
    ],
)
def test_what_cannot_be_kept_is_refused(n: int, rate: float, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        ScoreThreshold.of(np.zeros(n), rate)


@pytest.mark.parametrize("wrong", [(-1, 0.1, 0, 1), (float("nan"), 0.1, 0, 1), (1, 0, 0, 1), (1, 0.1, 0.5, 0.4)])
def test_a_threshold_must_make_sense(wrong: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        ScoreThreshold(*wrong)
