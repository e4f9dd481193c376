"""A-VAE: parity with the official modules at full size, and its behaviour on a narrow model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from export import families
from handlers.errors import InputError
from mlvgm import load_purifier
from mlvgm.avae import AVAE, read_avae
from mlvgm.checkpoint import CheckpointError
from mlvgm.load import ModelError
from tests import reference
from tests.mlvgm import small

FIXTURE = Path(__file__).parent / "fixtures" / "avae.npz"


@pytest.fixture(scope="module")
def purifier(tmp_path_factory: pytest.TempPathFactory) -> AVAE:
    return read_avae(small.save(small.avae(), tmp_path_factory.mktemp("avae")), small.AVAE_SIZE)


@pytest.mark.full
@pytest.mark.parametrize("size", [64, 128, 256])
@torch.no_grad()
def test_parity_with_the_official_modules(size: int) -> None:
    name = f"avae_{size}"
    expected = reference.outputs(f"{name}_seed1")
    purifier = load_purifier("avae", reference.checkpoint(name), image_size=size)
    assert isinstance(purifier, AVAE)
    images, noise = reference.comparator_inputs(expected)
    purified = purifier.purify(images, noise)
    skip, mean, log_variance = purifier.encode(images)
    actual = {"purified": purified.images, "skip": skip, "mu": mean, "log_var": log_variance}
    actual["style"] = purifier.style(purified.mixed[0].flatten(1))
    errors = {key: reference.relative_error(value, expected[key]) for key, value in actual.items()}
    print(json.dumps(errors))
    reference.release(name)
    assert max(errors.values()) < 1e-5, errors


def test_outputs_stay_as_recorded(purifier: AVAE) -> None:
    # Recorded when the code matched the official modules at full size; made by tests/mlvgm/fixtures/record.py.
    purified = small.reconstruct(purifier)
    with np.load(FIXTURE) as expected:
        assert reference.relative_error(purified.images, expected["images"]) < 1e-5
        assert reference.relative_error(purified.mixed[0], expected["latent"]) < 1e-5


def test_a_pure_function_of_images_and_noise(purifier: AVAE) -> None:
    images = small.images("avae", 3, 64)
    noise = [torch.randn(3, *shape) for shape in purifier.noise_shapes]
    purified = purifier.purify(images, noise)
    assert purified.images.shape == images.shape
    assert purified.codes[0].shape == purified.mixed[0].shape == (3, 16, 4, 4)
    assert torch.equal(purifier.purify(images, noise).images, purified.images)
    alone = purifier.purify(images[1:2], [tensor[1:2] for tensor in noise])
    torch.testing.assert_close(alone.images, purified.images[1:2], rtol=1e-4, atol=1e-4)
    for i in range(len(noise)):
        other = [-tensor if i == j else tensor for j, tensor in enumerate(noise)]
        assert not torch.allclose(purifier.purify(images, other).images, purified.images), i


def test_without_noise_the_latent_is_its_mean(purifier: AVAE) -> None:
    noise = [torch.zeros(2, *shape) for shape in purifier.noise_shapes]
    purified = purifier.purify(small.images("avae", 2, 64), noise)
    assert torch.equal(purified.mixed[0], purified.codes[0])


@pytest.mark.parametrize("size", [64, 128, 256])
def test_noise_of_the_published_sizes(size: int) -> None:
    with torch.device("meta"):
        shapes = AVAE(size).noise_shapes
    assert shapes == (*((1, 2**i, 2**i) for i in range(2, size.bit_length())), (512, 4, 4))


def test_wrong_arguments_are_named(purifier: AVAE) -> None:
    noise = [torch.zeros(1, *shape) for shape in purifier.noise_shapes]
    with pytest.raises(InputError, match=r"images must be \(B, 3, 64, 64\)"):
        purifier.purify(torch.zeros(1, 3, 32, 32), noise)
    with pytest.raises(InputError, match="takes 6 noise tensors, not 5"):
        purifier.purify(torch.zeros(1, 3, 64, 64), noise[1:])
    with pytest.raises(InputError, match=r"noise\[0\] must be \(1, 1, 4, 4\)"):
        purifier.purify(torch.zeros(1, 3, 64, 64), noise[::-1])


def test_the_size_has_to_fit_the_file(tmp_path: Path) -> None:
    path = small.save(small.avae(), tmp_path)
    with pytest.raises(CheckpointError, match="5 resolutions, for 64 pixels, not for image_size=128"):
        load_purifier("avae", path, image_size=128)
    with pytest.raises(CheckpointError, match="power of two"):
        load_purifier("avae", path, image_size=96)
    with pytest.raises(ModelError, match="needs image_size"):
        load_purifier("avae", path)


def test_a_file_of_another_family_names_the_first_missing_tensor(tmp_path: Path) -> None:
    path = small.save(small.ndvae(), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"small\.pt: tensor 'generator\.progression\.0\.conv1\.input' is missing"
    ):
        read_avae(path, 64)


def test_export_refuses_it(purifier: AVAE) -> None:
    with pytest.raises(ValueError, match="no export for a AVAE"):
        families.stages(purifier, blur=False, input_noise_l2=0.0)  # type: ignore[arg-type]
