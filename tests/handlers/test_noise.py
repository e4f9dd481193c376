import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from handlers.noise import SEED_BITS, fresh_seeds, image_noise, latent_noise

seeds = st.integers(0, 2**SEED_BITS - 1)
rows = st.lists(st.tuples(seeds, st.integers(0, 999)), min_size=1, max_size=5)


@given(rows, st.integers(0, 30))
def test_a_row_does_not_depend_on_its_neighbours(batch: list[tuple[int, int]], latent: int) -> None:
    together = latent_noise([s for s, _ in batch], [k for _, k in batch], latent, (2, 3))
    alone = [latent_noise([s], [k], latent, (2, 3))[0] for s, k in batch]
    assert np.array_equal(together, alone)


def test_every_word_of_the_counter_matters() -> None:
    draws = [
        latent_noise([1], [2], 3, (8,)),
        latent_noise([2], [2], 3, (8,)),
        latent_noise([1], [3], 3, (8,)),
        latent_noise([1], [2], 4, (8,)),
        latent_noise([3], [2], 1, (8,)),
        image_noise([1], [2], (4, 4)).reshape(1, -1)[:, :8],
        image_noise([1], [0], (4, 4)).reshape(1, -1)[:, :8],
        latent_noise([1], [0], 0, (8,)),
    ]
    assert len({draw.tobytes() for draw in draws}) == len(draws)


def test_noise_is_standard_normal() -> None:
    noise = latent_noise(range(100), [0] * 100, 0, (1000,))
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs((noise**4).mean() - 3) < 0.1
    correlation = np.corrcoef(noise)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.2


def test_the_draws_never_change() -> None:
    """A recorded request must give the same answer after an update."""
    expected = [0.69664234, -0.42022917, -0.63247955, -0.50257176]
    assert np.allclose(latent_noise([5], [0], 2, (4,)), expected, rtol=0, atol=1e-7)


def test_fresh_seeds_differ_and_fit() -> None:
    drawn = fresh_seeds(1000)
    assert len(set(drawn)) == 1000
    assert all(0 <= seed < 2**SEED_BITS for seed in drawn)
    assert max(drawn) > 2 ** (SEED_BITS - 2)
