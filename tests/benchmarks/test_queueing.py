"""The simulation against queueing theory, and against what `mlvgm bench server` measured."""

import numpy as np
import pytest

from benchmarks import queueing
from benchmarks.queueing import WorkerPool, per_million, simulate


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_a_server_that_answers_one_by_one_waits_as_theory_says(load: float) -> None:
    """Pollaczek and Khinchin: the mean wait of M/D/1 is load / (2 (1 - load)) services."""
    server = WorkerPool(lambda _: 1.0, workers=1, cores=1, batch=1, delay_s=0, queue=10**9)
    seconds, refused = simulate(server, load, 200_000)
    assert (len(seconds), refused) == (200_000, 0)
    assert seconds.mean() == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)


def test_at_overload_the_cores_are_busy_and_the_queue_is_bounded() -> None:
    server = WorkerPool(lambda n: 0.01 + 0.01 * n, workers=3, cores=2, batch=4, delay_s=0.002, queue=20)
    seconds, refused = simulate(server, 1000, 50_000)
    answered_per_s = len(seconds) / 50
    assert len(seconds) + refused == 50_000
    assert answered_per_s == pytest.approx(2 * 4 / 0.05, rel=0.02)
    assert np.max(seconds) < (20 + 3 * 4) / answered_per_s * 1.2


def test_a_lone_request_waits_for_others_and_then_has_a_core() -> None:
    server = WorkerPool(lambda n: 0.02 + 0.01 * n, workers=2, cores=1, batch=2, delay_s=0.005, queue=9)
    seconds, _ = simulate(server, 0.01, 100)
    assert np.median(seconds) == pytest.approx(0.035)


def test_it_agrees_with_the_measured_server() -> None:
    """Up to 80 % of saturation: beyond it, the measured times change by that much from run to run."""
    rows = queueing.compared(queueing._read("server-road-signs"), queueing._read("stages"))
    steady = [row for row in rows if row[0] <= 0.8]
    assert steady
    for _, middle, most, middle_here, most_here in steady:
        assert 1 / 1.5 < middle_here / middle < 1.5
        assert 1 / 1.5 < most_here / most < 1.5


def test_dollars_a_million(capsys: pytest.CaptureFixture[str]) -> None:
    assert per_million(3.6, 1000) == pytest.approx(1)
    queueing.main(["--cpu", "3.6", "--gpu", "7.2"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "pu) |" in line]
    for (what, _, rate), row in zip(queueing.rates(), rows, strict=True):
        assert row.startswith(f"| {what} ")
        assert row.endswith(f"| {per_million(7.2 if 'NVIDIA' in what else 3.6, rate):,.2f} |")
