import numpy as np
import pytest

from evaluation.shares import percent, share, wilson


def test_wilson_interval() -> None:
    """Against the worked values of Newcombe, Statistics in Medicine 1998, table I."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_share_of_nothing_is_none() -> None:
    assert share(np.array([True, False, True, True]))["share"] == 0.75
    empty = share(np.zeros(0, np.bool_))
    assert empty["share"] is None
    assert percent(empty) == "none"


def test_share_as_text() -> None:
    entry = share(np.arange(29) < 29)
    assert percent(entry) == "100.0% (88.3-100.0)"
    assert percent(entry, 0) == "100% (88-100)"
