import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.learning import learn, starts
from evaluation.tuning import Sets
from mlvgm.purifier import Purified, Purifier

SIDE = 8


class Halves(Purifier):
    """Two latents: the upper half of an image, which says what it is, and the lower one, where the attack is."""

    image_size = SIDE
    noise_shapes = ((3, SIDE // 2, SIDE), (3, SIDE // 2, SIDE))

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        return images.chunk(2, dim=2)

    def generate(self, encoded: tuple[Tensor, ...], noise: object, alphas: Tensor) -> Purified:
        fresh = [0.5 + 0.5 * each for each in noise]  # type: ignore[attr-defined]
        mixed = tuple((1 - a) * code + a * new for a, code, new in zip(alphas, encoded, fresh, strict=True))
        return Purified(torch.cat(mixed, dim=2), encoded, mixed)


class Brightness(nn.Module):
    """Class 1 for bright images."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-40 * mean, 40 * mean], dim=1)


def _images(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images that are dark or bright above and gray below, the same attacked below, and their classes."""
    labels = np.arange(count) % 2
    clean = np.full((count, SIDE, SIDE, 3), 128, np.uint8)
    clean[:, : SIDE // 2] = np.where(labels, 200, 55)[:, None, None, None]
    attacked = clean.copy()
    attacked[:, SIDE // 2 :] = np.where(labels, 5, 250)[:, None, None, None]
    return clean, attacked, labels.astype(np.int64)


@pytest.mark.parametrize("start", [(0.5, 0.5), (0.0, 0.0)])
def test_what_is_attacked_is_resampled_and_what_is_needed_is_kept(start: tuple[float, float]) -> None:
    clean, attacked, labels = _images(40)
    found = learn(Halves(), Brightness(), Sets(clean, {"a": attacked}, labels), start, steps=80, batch=16)
    assert found[0] < 0.1
    assert found[1] > 0.8
    assert all(0 <= alpha <= 1 and round(alpha / 0.005) * 0.005 == pytest.approx(alpha) for alpha in found)


def test_the_same_seed_learns_the_same() -> None:
    clean, attacked, labels = _images(10)

    def run(seed: int) -> tuple[float, ...]:
        return learn(Halves(), Brightness(), Sets(clean, {"a": attacked}, labels), (0.5, 0.5), 5, 4, True, 0.5, seed)

    assert run(0) == run(0)


def test_starts_are_as_many_alphas_as_there_are_latents() -> None:
    found = starts(5, (0.0, 0.1, 0.2, 0.3, 0.4))
    assert found["the bundle's own"] == (0.0, 0.1, 0.2, 0.3, 0.4)
    assert len(found) == 4
    assert {len(weights) for weights in found.values()} == {5}
