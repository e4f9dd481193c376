"""Certificates of the shipped model in the hands of attackers: nobody may succeed within a certified radius."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evaluation.adaptive import Effort, Trace, ascend
from evaluation.attacks import to_bytes, to_float
from evaluation.changes import L2
from evaluation.signs import drawn_signs
from handlers.certify import certify
from mlvgm.recipe import ROOT
from tests.evaluation.models import shipped

SIGMA, DRAWS, ALPHA = 0.25, 100, 0.001
SIGNS = ROOT.parent / "shared" / "data" / "gtsrb" / "test.npz"


def attack_certified(images: NDArray[np.uint8]) -> int:
    """Attack each of ``images`` up to the edge of its certified radius; says how many had one that is worth it.

    Gradients go through the smoothed defence. The answer at the attacked image must be the certified one, or none.
    """
    model = shipped()
    alphas, generator = torch.tensor(model.alphas), torch.Generator().manual_seed(0)

    def answers(images: torch.Tensor) -> torch.Tensor:
        noise = [torch.randn(len(images), *shape, generator=generator) for shape in model.purifier.noise_shapes]
        return model.classifier(model.purifier.purify(images, noise, alphas).images)

    @torch.no_grad()
    def classify(noisy: NDArray[np.float32]) -> NDArray[np.int64]:
        return answers(torch.from_numpy(noisy)).argmax(dim=1).numpy()

    def smoothed(images: torch.Tensor, draws: int) -> Trace:
        noisy = images.repeat(draws, 1, 1, 1)
        noisy = (noisy + SIGMA * torch.randn(noisy.shape, generator=generator)).clamp(0, 1)
        return Trace(answers(noisy).view(draws, len(images), -1))

    clean = to_float(images)
    found = certify(classify, clean.numpy(), 43, SIGMA, DRAWS, ALPHA, 64)
    rows = np.flatnonzero(found.radii > 0.15)
    for row in rows:
        radius, label = float(found.radii[row]), int(found.labels[row])
        one = clean[row : row + 1]
        attacked = ascend(smoothed, one, torch.tensor([label]), L2(radius - 0.04), Effort(8, 1, 8)).images
        sent = to_float(to_bytes(attacked))  # rounding to 8 bits moves it by less than what was left
        assert 0.5 * radius < float((sent - one).norm()) < radius
        again = certify(classify, sent.numpy(), 43, SIGMA, DRAWS, ALPHA, 64)
        assert again.labels[0] in (label, -1), (row, radius, label)
        assert again.counts[0].argmax() == label, (row, radius, label)
    return len(rows)


def test_no_attack_within_a_certified_radius_succeeds() -> None:
    assert attack_certified(np.stack([sign.image for sign in drawn_signs()[:4]])) >= 2


@pytest.mark.full
def test_no_attack_within_a_certified_radius_succeeds_on_500_signs() -> None:
    if not SIGNS.is_file():
        pytest.skip("the test signs are not here")
    images = np.load(SIGNS)["images"]
    chosen = np.random.default_rng(0).permutation(len(images))[:500]
    assert sum(attack_certified(images[rows]) for rows in np.split(chosen, 10)) > 100
