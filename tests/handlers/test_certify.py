import itertools
from statistics import NormalDist
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import pytest

from handlers import certify as module
from handlers.binomial import lower_bound
from handlers.certify import Certified, certify, selection_draws
from handlers.noise import fresh_generator

SHAPE = (3, 4, 4)
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@pytest.fixture(autouse=True)
def known_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is true of nearly all noise is tested with some that never changes."""
    keys = itertools.count()
    monkeypatch.setattr(module, "fresh_generator", lambda: np.random.Generator(np.random.Philox(next(keys))))


class Linear:
    """Class 1 above a plane: smoothed, it answers alike up to the plane, so the true radius is the distance to it."""

    def __init__(self, seed: int = 0) -> None:
        normal = np.random.default_rng(seed).standard_normal(SHAPE)
        self.normal = normal / np.linalg.norm(normal)
        self.seen: list[int] = []

    def __call__(self, images: Floats) -> Ints:
        self.seen.append(len(images))
        return (self.distance(images) > 0).astype(np.int64)

    def distance(self, images: Floats) -> npt.NDArray[np.float64]:
        """Signed, from the plane through mid-gray."""
        distances: npt.NDArray[np.float64] = ((images - 0.5) * self.normal).sum(axis=(1, 2, 3))
        return distances

    def images(self, distances: npt.ArrayLike) -> Floats:
        moved = 128 / 255 + np.asarray(distances)[:, None, None, None] * self.normal
        return (np.rint(moved * 255) / 255).astype(np.float32)


def certified(
    classify: Linear, images: Floats, draws: int = 1000, sigma: float = 0.1, alpha: float = 0.001
) -> Certified:
    return certify(classify, images, 2, sigma, draws, alpha, batch=256)


def gray() -> Floats:
    return np.full((1, 3, 32, 32), 128 / 255, np.float32)


def test_no_radius_exceeds_the_true_one() -> None:
    linear = Linear()
    images = linear.images(np.linspace(-0.4, 0.4, 81))
    distances = linear.distance(images)
    found = certified(linear, images)
    sure = ~found.abstained
    assert (found.labels[sure] == (distances[sure] > 0)).all()
    # Rounding to 8 bits moves the smoothed plane by less than this; 81 radii at alpha 0.001.
    assert (found.radii <= np.abs(distances) + 0.002).all()
    assert (found.radii[~sure] == 0).all()
    assert sure.mean() > 0.8
    assert found.radii.max() > 0.24


@pytest.mark.parametrize("true", [0.03, 0.1, 0.2])
def test_the_radius_is_that_of_the_known_probability(true: float) -> None:
    """The share of draws on the right side is Phi(distance / sigma), so its bound gives the distance, nearly."""
    linear = Linear(1)
    found = certified(linear, linear.images([true]), draws=10_000)
    p = NormalDist().cdf(float(linear.distance(linear.images([true]))[0]) / 0.1)
    assert found.counts[0, 1] / 10_000 == pytest.approx(p, abs=0.02)
    assert found.radii[0] == pytest.approx(true, abs=0.025)


def test_the_most_that_so_many_draws_can_give() -> None:
    """What unanimity is worth at sigma 0.25 and alpha 0.001, as published tables have it."""
    far = Linear().images([0.4])
    for draws, most in ((100, 0.375), (256, 0.48), (1000, 0.62)):
        found = certify(lambda images: np.ones(len(images), np.int64), far, 2, 0.25, draws, 0.001, 64)
        assert found.counts.tolist() == [[0, draws]]
        assert found.radii[0] == pytest.approx(most, abs=0.005)
        assert found.radii[0] == 0.25 * NormalDist().inv_cdf(lower_bound(draws, draws, 0.001))


def test_on_the_plane_it_abstains() -> None:
    found = certified(Linear(), Linear().images([0.0] * 20))
    assert found.abstained.sum() >= 19
    assert (found.labels[found.abstained] == -1).all()


def test_the_class_is_chosen_by_draws_of_its_own() -> None:
    """A classifier that answers otherwise once the choice is made: the count is of the class that was chosen."""
    answers = iter([1] * selection_draws(100) + [0] * 100)
    found = certify(
        lambda images: np.array([next(answers) for _ in images]), Linear().images([0.1]), 2, 0.25, 100, 0.001, 7
    )
    assert found.counts.tolist() == [[100, 0]]
    assert found.abstained.all()


def test_draws_without_a_class_count_for_none() -> None:
    places = np.arange(selection_draws(100) + 100)
    answers = iter(np.where(places % 10 == 0, -1, 1))
    found = certify(
        lambda images: np.array([next(answers) for _ in images]), Linear().images([0.1]), 2, 0.25, 100, 0.001, 64
    )
    assert found.counts.tolist() == [[0, 90]]
    assert found.radii[0] == pytest.approx(0.25 * NormalDist().inv_cdf(lower_bound(90, 100, 0.001)))


def test_the_classifier_sees_8_bit_images_in_full_batches() -> None:
    linear = Linear()
    batches: list[Floats] = []

    def watched(images: Floats) -> Ints:
        batches.append(images)
        return linear(images)

    certify(watched, linear.images([0.1, -0.2]), 2, 0.5, 100, 0.001, 32)
    seen = np.concatenate(batches)
    assert seen.dtype == np.float32
    assert len(seen) == 2 * (100 + selection_draws(100))
    assert {len(images) for images in batches[:-1]} == {32}
    assert np.array_equal(seen, (np.rint(seen * 255) / np.float32(255)).astype(np.float32))
    assert (seen.min(), seen.max()) == (0, 1)
    assert len(np.unique(seen, axis=0)) == len(seen), "no noise is used twice"


def test_the_noise_is_normal_before_it_is_clamped() -> None:
    seen: list[Floats] = []
    certify(lambda batch: seen.append(batch) or np.zeros(len(batch), np.int64), gray(), 2, 0.1, 40, 0.001, 8)
    noise = (np.concatenate(seen) - gray()) / 0.1
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert (np.abs(noise) < 1).mean() == pytest.approx(0.6827, abs=0.01)


def test_two_calls_never_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fresh_generator", fresh_generator)
    seen: list[Floats] = []
    for _ in range(2):
        certify(lambda batch: seen.append(batch) or np.zeros(len(batch), np.int64), gray(), 2, 0.1, 40, 0.001, 64)
    assert not np.array_equal(*seen)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"sigma": 0.0}, "sigma must be more than 0"),
        ({"sigma": float("nan")}, "sigma"),
        ({"sigma": float("inf")}, "sigma"),
        ({"draws": 0}, "draws must be 1 or more"),
        ({"alpha": 0.0}, "alpha must lie between"),
        ({"alpha": 1.0}, "alpha must lie between"),
    ],
)
def test_what_certifies_nothing_is_refused(arguments: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        certified(Linear(), Linear().images([0.1]), **arguments)  # type: ignore[arg-type]


def test_memory_is_that_of_a_batch_however_many_draws() -> None:
    def stop(images: Floats) -> NoReturn:
        raise InterruptedError(len(images))

    with pytest.raises(InterruptedError, match="8"):
        certify(stop, gray(), 2, 0.1, 10**15, 0.001, 8)
