import time

import pytest

from handlers.arrival import queue_seconds


def test_a_proxy_says_when_the_request_came() -> None:
    assert queue_seconds({"Accept": "*/*", "X-Request-Start": f"t={time.time() - 2:.3f}"}) == pytest.approx(2, abs=0.5)
    assert queue_seconds({"x-request-start": f"t={time.time() + 0.5:.3f}"}) == 0, (
        "clocks are read twice, and not in order"
    )


@pytest.mark.parametrize(
    "said",
    ["", "t=", "t=-5", "t=nan", "t=1e9", "t=\u0663", "1700000000", "t=0", "t=99999999999", f"t={'9' * 400}", None, 5],
)
def test_what_cannot_be_is_not_believed(said: object) -> None:
    assert queue_seconds({"X-Request-Start": said}) is None


def test_nobody_says() -> None:
    assert queue_seconds({}) is None
