import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.batching import buckets, chunks
from handlers.manifest import Batch


@given(st.integers(0, 300), st.integers(0, 300), st.sampled_from([Batch(1, 8, 32), Batch(4, 4, 8), Batch(1, 3, 5)]))
def test_chunks_hold_every_number_once_in_few_sizes(start: int, count: int, batch: Batch) -> None:
    sizes = buckets(batch, on_cpu=False)
    parts = list(chunks(start, start + count, sizes))
    assert np.array_equal(np.concatenate([np.arange(0), *parts]), np.arange(start, start + count))
    assert all(len(part) in sizes for part in parts[:-1])
    assert all(len(part) in sizes or len(part) < batch.min for part in parts)


@pytest.mark.parametrize(
    ("batch", "on_cpu", "further", "expected"),
    [
        (Batch(1, 8, 32), False, (), [32, 16, 8, 4, 2, 1]),
        (Batch(1, 8, 32, cpu=8), True, (), [8, 4, 2, 1]),
        (Batch(1, 3, 5), False, (), [5, 4, 3, 2, 1]),
        (Batch(4, 4, 8), False, (9, 6), [8, 6, 4]),
    ],
)
def test_engines_meet_few_sizes(batch: Batch, on_cpu: bool, further: tuple[int, ...], expected: list[int]) -> None:
    assert buckets(batch, on_cpu, *further) == expected
