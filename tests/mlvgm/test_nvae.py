"""NVAE against the official modules: a small configuration always, the others where ../shared is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlvgm.nvae import NVAE, NVAEConfig, NVAEPurifier, read_nvae
from mlvgm.purifier import Purified
from tests import reference

FIXTURES = Path(__file__).parent / "fixtures"
VARIANTS = ("no_preprocessing", "blur", "noise")
TOLERANCE = 1e-5


def purify(purifier: NVAEPurifier, meta: dict[str, Any], images: Any, draws: dict[str, Any]) -> Purified:
    """What the official modules computed for an outputs file, with its own draws."""
    names = [name for name, _ in meta["draws"]]
    return purifier.purify(
        torch.from_numpy(images.astype(np.float32) / np.float32(255)),
        [torch.from_numpy(draws[name]) for name in names[1:]],
        [alpha * meta["alpha_attenuation"] for alpha in meta["interpolation_alphas"]],
        blur=meta["gaussian_blur_input"],
        input_noise=torch.from_numpy(draws[names[0]]),
        input_noise_l2=meta["initial_noise_eps"],
    )


def errors(purified: Purified, expected: Any, prefix: str = "") -> dict[str, float]:
    found = {"purified": reference.relative_error(purified.images, expected[f"{prefix}purified"])}
    for kind, tensors in (("codes", purified.codes), ("mixed", purified.mixed)):
        for i, tensor in enumerate(tensors):
            found[f"{kind}_{i:02d}"] = reference.relative_error(tensor, expected[f"{prefix}{kind}_{i:02d}"])
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_configuration_with_flows(variant: str) -> None:
    purifier = read_nvae(FIXTURES / "nvae_small_nf_openmask.pt")
    with np.load(FIXTURES / "nvae_small_nf_openmask.npz") as expected:
        meta = json.loads(str(expected["meta"]))
        meta["gaussian_blur_input"] = variant == "blur"
        meta["initial_noise_eps"] = 1.0 if variant == "noise" else 0.0
        draws = {name: expected[f"draws/{name}"] for name, _ in meta["draws"]}
        found = errors(purify(purifier, meta, expected["images_u8"], draws), expected, f"{variant}/")
    assert len(found) == 11
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["nvae_small", "nvae_small_nf", "nvae_small_nf_openmask"])
def test_small_configurations_of_the_reference(name: str, variant: str) -> None:
    expected = reference.outputs(f"{name}_{variant}_seed1")
    meta = json.loads(str(expected["meta"]))
    draws = reference.draws_of(meta)
    purified = purify(read_nvae(reference.checkpoint(name)), meta, expected["images_u8"], draws)
    assert max(errors(purified, expected).values()) < TOLERANCE


@pytest.mark.full
def test_the_published_configuration() -> None:
    purifier = read_nvae(reference.checkpoint("nvae_celeba64"))
    classifier = None
    for variant in VARIANTS:
        expected = reference.outputs(f"ids_{variant}_seed1")
        meta = json.loads(str(expected["meta"]))
        draws = reference.draws_of(meta)
        purified = purify(purifier, meta, expected["images_u8"], draws)
        found = {"purified": reference.relative_error(purified.images, expected["purified"])}
        for i in range(purifier.n_latents):
            found[f"mixed_{i:02d}"] = reference.relative_error(purified.mixed[i], expected[f"mixed_{i:02d}"])
        if classifier is None:
            from mlvgm.vgg import read_vgg11

            classifier = read_vgg11(reference.checkpoint("vgg11_ids"), 100)
        found["logits"] = reference.relative_error(classifier(purified.images), expected["logits"])
        assert max(found.values()) < 1e-4, found


def test_configuration_survives_a_round_trip() -> None:
    config = NVAEConfig(
        resolution=32, groups=(1, 2, 4), cells_per_group=1, latent_channels=8, flow_cells=0, channels=16,
        blocks=1, cells_per_block=1, mixtures=3, expansion=2, kernel=3,
    )  # fmt: skip
    assert NVAEConfig.from_checkpoint(config.to_checkpoint()) == config
    assert config.latents() == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert [config.side(s) for s in range(3)] == [4, 8, 16]


def test_alpha_one_forgets_the_image_and_alpha_zero_the_noise() -> None:
    torch.manual_seed(0)
    config = NVAEConfig(
        resolution=16, groups=(1, 2), cells_per_group=1, latent_channels=2, flow_cells=0, channels=4,
        blocks=1, cells_per_block=1, mixtures=2, expansion=2, kernel=3,
    )  # fmt: skip
    purifier = NVAEPurifier(NVAE(config)).eval().requires_grad_(False)
    images = torch.rand(2, 3, 16, 16)
    noise = [torch.randn(2, *shape) for shape in purifier.noise_shapes]
    other = [torch.randn(2, *shape) for shape in purifier.noise_shapes]
    keep, replace = torch.zeros(3), torch.ones(3)
    assert torch.equal(purifier.purify(images, noise, keep).images, purifier.purify(images, other, keep).images)
    assert torch.equal(
        purifier.purify(images, noise, replace).images, purifier.purify(1 - images, noise, replace).images
    )
    assert not torch.equal(purifier.purify(images, noise, keep).images, purifier.purify(images, noise, replace).images)


@pytest.mark.parametrize(
    ("images", "noise", "alphas", "words"),
    [
        ((1, 3, 8, 8), (1, 2, 4, 4), 3, "images must be"),
        ((1, 3, 16, 16), (2, 2, 4, 4), 3, r"noise\[0\] must be"),
        ((1, 3, 16, 16), (1, 2, 4, 4), 2, "3 latents"),
    ],
)
def test_wrong_arguments_are_named(images: tuple[int, ...], noise: tuple[int, ...], alphas: int, words: str) -> None:
    config = NVAEConfig(
        resolution=16, groups=(1, 2), cells_per_group=1, latent_channels=2, flow_cells=0, channels=4,
        blocks=1, cells_per_block=1, mixtures=2, expansion=2, kernel=3,
    )  # fmt: skip
    purifier = NVAEPurifier(NVAE(config)).eval()
    tensors = [torch.zeros(noise), torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)]
    with pytest.raises(ValueError, match=words):
        purifier.purify(torch.zeros(images), tensors, torch.zeros(alphas))
