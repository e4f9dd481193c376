"""VGG-11: parity at full size, and the width and pool that are read off a checkpoint."""

from pathlib import Path

import pytest
import torch

from mlvgm.checkpoint import CheckpointError
from mlvgm.vgg import VGG11, read_vgg11
from tests import reference


def save(model: VGG11, path: Path) -> Path:
    torch.save({"epoch": 1, "global_step": 1, "state_dict": model.state_dict()}, path)
    return path


def test_width_and_pool_are_read_off_the_tensors(tmp_path: Path) -> None:
    model = VGG11(n_classes=5, width=0.125, pool=2).eval()
    loaded = read_vgg11(save(model, tmp_path / "vgg.pt"), 5)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), loaded(images))
    assert loaded.features(images).shape == (2, 64 * 4)


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    path = save(VGG11(n_classes=5, width=0.125, pool=1), tmp_path / "vgg.pt")
    with pytest.raises(CheckpointError, match=r"vgg\.pt: 'model\.classifier\.3\.weight' has shape \(5, 64\), expected"):
        read_vgg11(path, 7)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"state_dict": {"conv.weight": torch.zeros(1)}}, path)
    with pytest.raises(
        CheckpointError, match=r"other\.pt: tensor .model.features.0.weight. is missing .* another architecture"
    ):
        read_vgg11(path, 7)


@pytest.mark.full
def test_official_logits() -> None:
    expected = reference.outputs("vgg11_ids_seed1")
    classifier = read_vgg11(reference.checkpoint("vgg11_ids"), 100)
    images = torch.from_numpy(expected["images_u8"].astype("float32") / 255)
    assert reference.relative_error(classifier.features(images), expected["features"]) < 1e-5
    assert reference.relative_error(classifier(images), expected["logits"]) < 1e-5
