"""The e4e purifier: the code's structure, and parity with the official modules at full size."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mlvgm.e4e import E4ePurifier, Encoder4Editing, StyleHead, read_e4e
from mlvgm.resnet import ResNetClassifier, read_resnet50
from tests import reference
from tests.mlvgm import small

FIXTURE = Path(__file__).parent / "fixtures" / "e4e.npz"


@pytest.fixture(scope="module")
def purifier(tmp_path_factory: pytest.TempPathFactory) -> E4ePurifier:
    return read_e4e(small.save(small.e4e(), tmp_path_factory.mktemp("e4e")))


def test_outputs_stay_as_recorded(purifier: E4ePurifier) -> None:
    # Recorded when the code matched the official modules at full size; made by tests/mlvgm/fixtures/record.py.
    with np.load(FIXTURE) as expected:
        purified = small.purify(purifier, blur=True)
        for name, value in small.summary(purified).items():
            assert reference.relative_error(value, expected[name]) < 1e-5, name


def test_sizes(purifier: E4ePurifier) -> None:
    assert purifier.noise_shapes == ((16,),) * 8
    (codes,) = purifier.encode(small.images("sizes", 3, 256))
    assert codes.shape == (3, 8, 16)
    assert purifier.decode(codes).shape == (3, 3, 256, 256)
    assert not purifier.training
    assert not any(parameter.requires_grad for parameter in purifier.parameters())


def test_heads_read_the_published_maps() -> None:
    encoder = Encoder4Editing(small.WIDTHS, n_latents=10, style_dim=16).eval().requires_grad_(False)
    halvings = [sum(isinstance(layer, torch.nn.Conv2d) for layer in head.convs) for head in heads(encoder)]
    assert halvings == [4] * 3 + [5] * 4 + [6] * 3
    images = small.images("heads", 2, 256)
    coarse, medium, fine = encoder.pyramid(images)
    codes = encoder(images)
    for i, head in enumerate(heads(encoder)):
        own = head(coarse if i < 3 else medium if i < 7 else fine)
        # Row 0 is the base that every other row is an offset from.
        torch.testing.assert_close(codes[:, i], own if i == 0 else codes[:, 0] + own)


def heads(encoder: Encoder4Editing) -> Iterator[StyleHead]:
    for head in encoder.styles:
        assert isinstance(head, StyleHead)
        yield head


def test_mean_code_is_optional(tmp_path: Path, purifier: E4ePurifier) -> None:
    images = small.images("mean", 1, 256)
    without = read_e4e(small.save(small.e4e(start_from_latent_avg=False), tmp_path))
    (centred,), (plain,) = purifier.encode(images), without.encode(images)
    torch.testing.assert_close(centred - plain, small.e4e()["latent_avg"][None])


@pytest.mark.parametrize("shape", [(16,), (1, 16)])
def test_one_mean_for_all_rows(shape: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint = small.e4e()
    checkpoint["latent_avg"] = small.draw("one mean", shape)
    loaded = read_e4e(small.save(checkpoint, tmp_path))
    torch.testing.assert_close(loaded.latent_avg, checkpoint["latent_avg"].expand(8, 16))


@pytest.mark.parametrize("size", [32, 512])
def test_images_are_pooled_to_256(size: int, tmp_path: Path) -> None:
    purifier = read_e4e(small.save(small.e4e(size), tmp_path))
    codes = small.draw("codes", (1, purifier.n_latents, 16))
    raw, images = purifier.decoder(codes).numpy(), purifier.decode(codes).numpy()
    if size > 256:
        step = size // 256
        expected = raw.reshape(1, 3, 256, step, 256, step).mean(axis=(3, 5))
    else:
        expected = raw.repeat(256 // size, axis=2).repeat(256 // size, axis=3)
    np.testing.assert_allclose(images, (expected + 1) / 2, atol=1e-6)


Pair = tuple[E4ePurifier, ResNetClassifier]


@pytest.fixture(scope="module")
def published() -> Iterator[Pair]:
    yield read_e4e(reference.checkpoint("e4e_ffhq_1024")), read_resnet50(reference.checkpoint("resnet50_gender"), 2)
    reference.release("e4e_ffhq_1024")


@pytest.mark.full
@pytest.mark.parametrize("variant", ["no_preprocessing", "blur", "noise"])
@torch.no_grad()
def test_parity_with_the_official_modules(variant: str, published: Pair) -> None:
    purifier, classifier = published
    expected = reference.outputs(f"gender_{variant}_seed1")
    errors, purified = reference.compare(purifier, classifier, expected)
    raw = purifier.decoder(torch.stack(purified.mixed, dim=1))[:, :, 448:576, 448:576]
    errors["generator_crop"] = reference.relative_error(raw, expected["generator_crop"])
    print(json.dumps(errors))
    assert max(errors.values()) < 1e-4, errors
