"""How the memory of workers is judged."""

import pytest

from tests.stress.watch import growth


def test_growth_begins_after_the_first_tenth() -> None:
    memory = [(0.0, 100), (1.0, 200), (2.0, 205), (9.0, 210)]
    assert growth(memory, since=0.5) == pytest.approx(0.05)
    assert growth(memory, since=10) is None
