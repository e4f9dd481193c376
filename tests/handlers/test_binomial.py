import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.binomial import lower_bound

counts = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
alphas = st.floats(1e-6, 0.5)


@settings(max_examples=200)
@given(counts, alphas)
def test_the_lower_bound_is_the_beta_quantile(count: tuple[int, int], alpha: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    k, n = count
    expected = stats.beta.ppf(alpha, k, n - k + 1) if k else 0.0
    assert lower_bound(k, n, alpha) == pytest.approx(expected, rel=1e-6)


@given(counts, alphas)
def test_the_bound_errs_on_the_safe_side(count: tuple[int, int], alpha: float) -> None:
    """At the bound, so many successes or more come with probability alpha at most."""
    stats = pytest.importorskip("scipy.stats")
    k, n = count
    assert stats.binom.sf(k - 1, n, lower_bound(k, n, alpha)) <= alpha * (1 + 1e-9) or k == 0


@given(st.integers(1, 5000), alphas)
def test_all_of_n_has_a_closed_form(n: int, alpha: float) -> None:
    assert lower_bound(n, n, alpha) == pytest.approx(alpha ** (1 / n), rel=1e-8)


def test_the_true_probability_is_below_the_bound_as_seldom_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for p in (0.5, 0.9, 0.99):
        counts, times = np.unique(rng.binomial(100, p, 2000), return_counts=True)
        bounds = np.array([lower_bound(int(k), 100, 0.05) for k in counts])
        above = times[bounds > p].sum() / 2000
        assert above <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)
