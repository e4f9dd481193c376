"""ND-VAE: parity with the official modules at full size, and its behaviour on a narrow model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from handlers.errors import InputError
from mlvgm import load_purifier
from mlvgm.checkpoint import CheckpointError
from mlvgm.load import ModelError
from mlvgm.ndvae import NDVAE, NDVAEConfig, read_ndvae
from tests import reference
from tests.mlvgm import small

FIXTURE = Path(__file__).parent / "fixtures" / "ndvae.npz"


@pytest.fixture(scope="module")
def purifier(tmp_path_factory: pytest.TempPathFactory) -> NDVAE:
    return read_ndvae(small.save(small.ndvae(), tmp_path_factory.mktemp("ndvae")), small.ndvae_h())


@pytest.mark.full
@pytest.mark.parametrize("task", ["ids", "cars", "gender"])
@torch.no_grad()
def test_parity_with_the_official_modules(task: str) -> None:
    name = f"ndvae_{task}"
    expected = reference.outputs(f"{name}_seed1")
    manifest = reference.manifest(name)
    h = torch.from_numpy(reference.draws.flat(1, f"{name}.h", manifest["h_shape"]))
    purifier = load_purifier("ndvae", reference.checkpoint(name), h=h)
    assert isinstance(purifier, NDVAE)
    assert (purifier.image_size, purifier.noise_std) == (manifest["image_size"], manifest["config"]["noise_std"])
    images, noise = reference.comparator_inputs(expected)
    purified = purifier.purify(images, noise)
    actual = {"purified": purified.images}
    for i, (mean, latent) in enumerate(zip(purified.codes, purified.mixed, strict=True)):
        rows, columns = expected[f"z_{i}"].shape[2:]  # large maps are stored as their upper left corner
        actual |= {f"z_mu_{i}": mean[:, :, :rows, :columns], f"z_{i}": latent[:, :, :rows, :columns]}
    errors = {key: reference.relative_error(value, expected[key]) for key, value in actual.items()}
    print(json.dumps(errors))
    reference.release(name)
    assert max(errors.values()) < 1e-5, errors


def test_outputs_stay_as_recorded(purifier: NDVAE) -> None:
    # Recorded when the code matched the official modules at full size; made by tests/mlvgm/fixtures/record.py.
    purified = small.reconstruct(purifier)
    with np.load(FIXTURE) as expected:
        assert reference.relative_error(purified.images, expected["images"]) < 1e-5
        assert reference.relative_error(purified.mixed[-1], expected["latent"]) < 1e-5


def test_a_pure_function_of_images_and_noise(purifier: NDVAE) -> None:
    images = small.images("ndvae", 3, 32)
    noise = [torch.randn(3, *shape) for shape in purifier.noise_shapes]
    purified = purifier.purify(images, noise)
    assert purified.images.shape == images.shape
    assert purified.images.min() >= 0
    assert purified.images.max() <= 1
    assert [tuple(latent.shape) for latent in purified.mixed] == [(3, 32, 4, 4), (3, 32, 4, 4), (3, 16, 8, 8)]
    assert torch.equal(purifier.purify(images, noise).images, purified.images)
    alone = purifier.purify(images[1:2], [tensor[1:2] for tensor in noise])
    torch.testing.assert_close(alone.images, purified.images[1:2], rtol=1e-4, atol=1e-4)
    for i in range(len(noise)):
        other = [-tensor if i == j else tensor for j, tensor in enumerate(noise)]
        assert not torch.allclose(purifier.purify(images, other).images, purified.images), i


def test_input_noise_is_added_and_clamped(purifier: NDVAE) -> None:
    noise = [torch.zeros(1, *shape) for shape in purifier.noise_shapes]
    white = purifier.purify(torch.ones(1, 3, 32, 32), noise).images
    brighter = [torch.ones(1, 3, 32, 32), *noise[1:]]
    assert torch.equal(purifier.purify(torch.ones(1, 3, 32, 32), brighter).images, white)
    grey = purifier.purify(torch.full((1, 3, 32, 32), 0.5), brighter).images
    torch.testing.assert_close(grey, purifier.purify(torch.full((1, 3, 32, 32), 0.6), noise).images)


def test_h_is_an_argument(purifier: NDVAE, tmp_path: Path) -> None:
    path = small.save(small.ndvae(), tmp_path)
    other = read_ndvae(path, 1 - small.ndvae_h())
    assert not torch.allclose(small.reconstruct(other).images, small.reconstruct(purifier).images)
    assert load_purifier("ndvae", path, h=torch.zeros(1, 32, 8, 8)).image_size == 64
    for shape in ((1, 16, 4, 4), (32, 4, 4), (2, 32, 4, 4), (1, 32, 4, 8)):
        with pytest.raises(CheckpointError, match=r"'h' must be \(1, 32, h, h\)"):
            load_purifier("ndvae", path, h=torch.zeros(shape))
    with pytest.raises(ModelError, match="needs h"):
        load_purifier("ndvae", path)


@pytest.mark.parametrize("name", ["ids", "cars", "gender"])
def test_every_published_tensor_has_its_place(name: str) -> None:
    manifest = reference.manifest(f"ndvae_{name}")
    config, h_shape = manifest["config"], manifest["h_shape"]
    shape = NDVAEConfig(config["encoding_channels"], config["scales"], config["groups"], config["cells"])
    with torch.device("meta"):
        own = NDVAE(shape, torch.zeros(h_shape), config["noise_std"]).state_dict()
        given = {key: torch.zeros(entry[0]) for key, entry in manifest["tensors"].items()}
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in given.items()}
    assert NDVAEConfig.from_tensors(given, "") == shape


def test_wrong_arguments_are_named(purifier: NDVAE) -> None:
    noise = [torch.zeros(1, *shape) for shape in purifier.noise_shapes]
    with pytest.raises(InputError, match=r"images must be \(B, 3, 32, 32\)"):
        purifier.purify(torch.zeros(1, 3, 64, 64), noise)
    with pytest.raises(InputError, match="takes 4 noise tensors, not 3"):
        purifier.purify(torch.zeros(1, 3, 32, 32), noise[1:])
    with pytest.raises(InputError, match=r"noise\[0\] must be \(1, 3, 32, 32\)"):
        purifier.purify(torch.zeros(1, 3, 32, 32), noise[::-1])


def test_files_without_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"small\.pt: tensor 'stem\.weight' is missing"):
        read_ndvae(small.save(small.avae(), tmp_path), small.ndvae_h())
    tensors = {key: value for key, value in small.ndvae().items() if not key.startswith("decoder.dec_tower")}
    with pytest.raises(CheckpointError, match=r"'decoder\.dec_tower' and .* have 0 scales"):
        read_ndvae(small.save(tensors, tmp_path), small.ndvae_h())
