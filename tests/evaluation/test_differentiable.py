"""`Differentiable` against ``purify`` of the same purifier, with the noise that the pipeline draws."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from evaluation.differentiable import Differentiable
from handlers.noise import image_noise, latent_noise
from mlvgm.e4e import read_e4e
from mlvgm.purifier import Purifier
from tests.export import models
from tests.mlvgm import small

SEEDS, SAMPLES = [5, 9], 3


def small_purifier(family: str, folder: Path) -> Purifier:
    return models.purifier() if family == "nvae" else read_e4e(small.save(small.e4e(32), folder))


def expected(purifier: Purifier, images: Tensor, alphas: list[float], blur: bool, l2: float) -> Tensor:
    """What ``purify`` makes of every sample, all of them computed from the image on."""
    rows, samples = SEEDS * SAMPLES, [0, 0, 1, 1, 2, 2]
    noise = [torch.from_numpy(latent_noise(rows, samples, i, shape)) for i, shape in enumerate(purifier.noise_shapes)]
    side = purifier.image_size
    extra = torch.from_numpy(image_noise(rows, samples, (side, side))) if l2 else None
    return purifier.purify(images.repeat(SAMPLES, 1, 1, 1), noise, alphas, blur, extra, l2).images


@pytest.mark.parametrize("family", ["nvae", "e4e"])
@pytest.mark.parametrize(("kept", "blur", "l2"), [(0, False, 0.0), (1, False, 0.0), (2, True, 0.0), (2, False, 0.5)])
def test_same_images_and_gradients_as_the_published_operators(
    family: str, kept: int, blur: bool, l2: float, tmp_path: Path
) -> None:
    purifier = small_purifier(family, tmp_path)
    alphas = [0.0] * kept + [0.7] * (purifier.n_latents - kept)
    side = purifier.image_size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, taken = Differentiable(purifier, alphas, blur, l2)(images, SAMPLES, SEEDS)
    wanted = expected(purifier, images, alphas, blur, l2)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-4)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((found * weights).sum(), images, retain_graph=True)
    (other,) = torch.autograd.grad((wanted * weights).sum(), images)
    assert torch.allclose(gradient, other, rtol=0, atol=1e-3 * float(other.abs().max()))
    assert float(other.abs().max()) > 0
    once = {name for name, tensors in taken.items() if len(tensors[0]) == len(images)}
    assert once == (set() if l2 else {"encode", "coarse"} & set(taken))


def test_other_noise_at_every_call_without_seeds() -> None:
    purifier = models.purifier()
    draw = Differentiable(purifier, [0.0, 0.5, 1.0], False, 0.0)
    images = torch.rand(1, 3, 32, 32)
    first, second = (draw(images, 2)[0] for _ in range(2))
    assert not torch.allclose(first, second)
    assert not torch.allclose(first[0], first[1])
