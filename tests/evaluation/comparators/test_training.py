"""Every comparator is trained by its command, and its file is of the published format."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from evaluation.comparators.__main__ import COMPARATORS, main
from evaluation.comparators.autoencoders import NDVAE_CONFIG, Gaussian, draw, read, start
from evaluation.comparators.classifiers import Attack
from mlvgm.load import load_classifier
from tests.evaluation.models import linear, shipped

CLASSES = 43


@pytest.fixture(scope="module")
def signs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tracks of each class, of one image each."""
    shipped()
    labels = np.arange(2 * CLASSES) % CLASSES
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
    file = tmp_path_factory.mktemp("signs") / "train.npz"
    np.savez(file, images=images, labels=labels.astype(np.uint8), tracks=np.arange(len(labels)) // CLASSES)
    return file


@pytest.mark.parametrize("name", ["pgd", "another"])
def test_a_classifier_is_of_the_published_format(name: str, signs: Path, tmp_path: Path) -> None:
    about = _train(name, signs, tmp_path)
    classifier = load_classifier("vgg11", tmp_path / f"{name}.safetensors", CLASSES)
    assert classifier(torch.zeros(2, 3, 32, 32)).shape == (2, CLASSES)
    assert (about["step"], about["device"]) == (1, "cpu")
    assert all(0 <= share <= 1 for share in about["held_out"].values())


@pytest.mark.parametrize("name", ["avae", "ndvae"])
def test_an_autoencoder_is_of_its_familys_format(name: str, signs: Path, tmp_path: Path) -> None:
    _train(name, signs, tmp_path)
    purifier = read(name, tmp_path / f"{name}.safetensors")
    images = torch.rand(2, 3, 32, 32)
    torch.manual_seed(0)
    first = purifier.purify(images, noise := draw(purifier, 2)).images
    assert first.shape == images.shape
    again = read(name, tmp_path / f"{name}.safetensors").purify(images, noise).images
    assert torch.equal(first, again)
    assert not torch.equal(first, purifier.purify(images, draw(purifier, 2)).images)


def test_answers_to_attacked_images_count_for_trades() -> None:
    trades: Any = COMPARATORS["trades"]()
    classifier = linear(side=32)
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    loss = trades.loss(classifier, images, labels)
    assert loss > F.cross_entropy(classifier(images), labels) + 1


def test_an_attack_is_within_its_ball_and_climbs() -> None:
    classifier, images = linear(), torch.rand(5, 3, 8, 8)
    labels = classifier(images).argmax(1)

    def objective(changed: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(classifier(changed), labels, reduction="sum")

    attacked = Attack(l2=0.5)(images, objective)
    distance = (attacked - images).flatten(1).norm(dim=1)
    assert distance.max() <= 0.5 + 1e-5
    assert 0 <= attacked.min() <= attacked.max() <= 1
    assert objective(attacked) > objective(images) + 1


def test_divergence_from_the_standard_normal_distribution() -> None:
    mean, sigma = torch.randn(3, 2, 4, 4), torch.rand(3, 2, 4, 4) + 0.1
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, sigma), torch.distributions.Normal(0.0, 1.0)
    )
    assert Gaussian(mean, sigma).divergence().tolist() == pytest.approx(exact.sum(dim=(1, 2, 3)).tolist(), rel=1e-5)


def test_the_constant_of_an_ndvae_is_always_the_same() -> None:
    assert torch.equal(start(NDVAE_CONFIG), start(NDVAE_CONFIG))
    assert start(NDVAE_CONFIG).shape == (1, 32, 8, 8)


@pytest.mark.parametrize("content", [{}, {"images": np.zeros((2, 8, 8, 3), np.uint8)}])
def test_other_files_are_refused(content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.npz"
    np.savez(file, **content, labels=np.zeros(2, np.int64), tracks=np.zeros(2, np.int64))
    assert main(["train", "pgd", str(file), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ")
    assert error.count("\n") == 1


def _train(name: str, signs: Path, folder: Path) -> dict[str, Any]:
    """One step; what the file says of it."""
    assert main(["train", name, str(signs), "--out", str(folder), "--steps", "1", "--device", "cpu"]) == 0
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        about: dict[str, Any] = json.loads(file.metadata()["about"])
    assert math.isfinite(sum(about["held_out"].values()))
    assert about["settings"]["steps"] == 1
    return about
