"""Settings: named sizes build, what cannot be built or written is refused in one sentence, YAML reads back."""

from pathlib import Path

import pytest
import yaml

from handlers.errors import MlvgmError
from handlers.fields import FieldError
from mlvgm.nvae import NVAEConfig
from mlvgm.training.settings import SIZES, Shape, TrainingError, TrainingSettings, named_settings, read_settings


@pytest.mark.parametrize("image_size", [32, 40, 48, 64, 96, 128, 160, 224, 256])
@pytest.mark.parametrize("size", SIZES)
def test_named_sizes_can_be_built_and_written(size: str, image_size: int) -> None:
    settings = named_settings(size, image_size)
    config = settings.shape.config(image_size)
    assert NVAEConfig.from_checkpoint(config.to_checkpoint()) == config
    assert config.side(0) >= 4
    assert config.width(0) <= 1024


@pytest.mark.parametrize("image_size", [0, 31, 50, 257, 512])
def test_other_image_sizes_are_refused(image_size: int) -> None:
    with pytest.raises(TrainingError, match="multiple of 8 from 32 to 256"):
        named_settings("small", image_size)


def test_an_unknown_size_is_named_with_the_nearest() -> None:
    with pytest.raises(TrainingError, match=r"'smal'.*small"):
        named_settings("smal", 64)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape((3, 1)), "the checkpoint format cannot say"),
        (Shape((1, 2, 3)), "the checkpoint format cannot say"),
        (Shape((1, 2, 4), kernel=4), "must be odd"),
        (Shape((4, 4, 4, 4, 4, 4), halvings=3), "that 256 divides"),
    ],
)
def test_shapes_that_cannot_be_are_refused(shape: Shape, words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        shape.config(64)


def test_settings_read_back_from_yaml(tmp_path: Path) -> None:
    settings = named_settings("small", 64, steps=77, noise=0.1)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(settings.as_mapping()))
    assert read_settings(tmp_path / "s.yaml") == settings
    assert read_settings(tmp_path / "s.yaml", steps=5).steps == 5
    assert read_settings(tmp_path / "s.yaml", steps=5).digest != settings.digest


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("image_size: 64", "shape"),
        ("image_size: large\nshape: {latents_per_scale: [1, 2]}", "image_size is 'large'"),
        ("image_size: 64\nshape: {latents_per_scale: [1, 2], chanels: 4}", "chanels"),
        ("image_size: 64\nshape: {latents_per_scale: [1, 2]}\nnoise: -1", "noise is -1"),
        (
            "image_size: 64\nshape: {latents_per_scale: [1, 2]}\nnoise: 0.1\nleast_noise: 0.2",
            "least_noise is 0.2, must be at most noise, which is 0.1",
        ),
        ("image_size: 64\nshape: {latents_per_scale: []}", "latents_per_scale"),
        ("image_size: 64\nshape: {latents_per_scale: [1, 65]}", "latents_per_scale"),
        ("image_size: 64\nshape: {latents_per_scale: [1, 2], cells_per_latent: 17}", "cells_per_latent is 17"),
        ("- 1", "holds no settings"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(FieldError, match=words) as raised:
        read_settings(tmp_path / "s.yaml")
    assert isinstance(raised.value, MlvgmError)
    assert "s.yaml" in str(raised.value)


def test_the_digest_is_of_every_field() -> None:
    shape = Shape((1, 2))
    digests = {
        TrainingSettings(64, shape, **change).digest for change in ({}, {"beta": 0.2}, {"seed": 1}, {"noise": 0.2})
    }  # type: ignore[arg-type]
    assert len(digests) == 4
