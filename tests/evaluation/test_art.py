"""The adapters in the hands of ART itself."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("art")

from art.attacks.evasion import HopSkipJump, ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier

from evaluation.art import Purification, client_estimator
from evaluation.attacks import AttackError
from mlvgm.load import load_purifier
from tests.mlvgm import small

SIDE = 16


class Client:
    """As `handlers.client.Client`; reads whether an image is bright."""

    def __init__(self) -> None:
        self.asked = 0

    def predict(self, image: bytes, model: str, top_k: int) -> dict:
        self.asked += 1
        assert (model, top_k) == ("tiny", 2)
        bright = float(np.asarray(Image.open(io.BytesIO(image))).mean()) / 255
        top = [{"index": 1, "confidence": bright}, {"index": 0, "confidence": 1 - bright}]
        return {"index": int(bright > 0.5), "top_k": top, "flagged": False, "score": 0.1}


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))
    with torch.no_grad():
        network[2].weight.copy_(torch.from_numpy(np.random.default_rng(0).standard_normal((3, 48), np.float32)))
        network[2].bias.zero_()
    return network.eval()


@pytest.fixture(scope="module")
def purification(tmp_path_factory: pytest.TempPathFactory) -> Purification:
    file = tmp_path_factory.mktemp("nvae") / "nvae.pt"
    torch.save(small.nvae(), file)
    return Purification(load_purifier("nvae", file), [0.0, 0.0, 0.0])


def estimator(classifier: nn.Module, *before: Purification) -> PyTorchClassifier:
    return PyTorchClassifier(
        classifier,
        nn.CrossEntropyLoss(),
        (3, SIDE, SIDE),
        3,
        clip_values=(0, 1),
        preprocessing_defences=list(before),
        device_type="cpu",
    )


def test_predictions_and_gradients_go_through_the_purifier(classifier: nn.Module, purification: Purification) -> None:
    images = small.images("photographs", 4, SIDE)
    behind = estimator(classifier, purification)
    purified = purification.forward(images)[0]
    assert purified.shape == images.shape
    assert not torch.allclose(purified, images, atol=1e-2)
    assert np.allclose(behind.predict(images.numpy()), classifier(purified).detach().numpy(), atol=1e-5)
    labels = classifier(purified).argmax(dim=1)
    own = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(classifier(purification.forward(own)[0]), labels, reduction="mean")
    (expected,) = torch.autograd.grad(loss, own)
    found = behind.loss_gradient(images.numpy(), np.eye(3, dtype=np.float32)[labels.numpy()])
    assert np.abs(expected.numpy()).max() > 0
    assert np.allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_an_attack_of_art_lowers_what_the_purifier_leaves(classifier: nn.Module, purification: Purification) -> None:
    images = small.images("photographs", 4, SIDE).numpy()
    behind = estimator(classifier, purification)
    before = behind.predict(images)
    labels = before.argmax(axis=1)
    attack = ProjectedGradientDescent(behind, norm=2, eps=1.0, eps_step=0.25, max_iter=10, verbose=False)
    attacked = attack.generate(images, np.eye(3, dtype=np.float32)[labels])
    after = behind.predict(attacked)

    def margin(logits: np.ndarray) -> np.ndarray:
        own = np.take_along_axis(logits, labels[:, None], 1)[:, 0]
        return own - np.where(np.eye(3, dtype=bool)[labels], -np.inf, logits).max(axis=1)

    assert (margin(after) < margin(before)).all()
    assert np.sqrt(((attacked - images) ** 2).sum(axis=(1, 2, 3))).max() < 1.01


def test_each_call_draws_its_own_noise(classifier: nn.Module, purification: Purification) -> None:
    random = Purification(purification.purifier, [1.0, 1.0, 1.0])
    images = small.images("photographs", 2, SIDE)
    assert not torch.allclose(random.forward(images)[0], random.forward(images)[0], atol=1e-4)


def test_a_server_is_only_asked_and_not_too_often() -> None:
    client = Client()
    black_box = client_estimator(client, "tiny", (8, 8), 2, queries=400)  # type: ignore[arg-type]
    images = np.full((1, 8, 8, 3), 0.6, np.float32)
    assert np.allclose(black_box.predict(images), [[0.4, 0.6]], atol=1e-2)
    with pytest.raises(AttackError, match="budget of 400 queries"):
        HopSkipJump(black_box, max_iter=50, init_eval=10, verbose=False).generate(images)
    assert 100 < client.asked <= 400


def test_an_attack_of_art_on_a_server() -> None:
    client = Client()
    black_box = client_estimator(client, "tiny", (8, 8), 2)  # type: ignore[arg-type]
    images = np.full((1, 8, 8, 3), 0.6, np.float32)
    hop = HopSkipJump(black_box, max_iter=2, init_eval=20, max_eval=40, verbose=False)
    attacked = hop.generate(images, x_adv_init=np.full_like(images, 0.1))
    assert black_box.predict(attacked).argmax() == 0
    assert client.asked > 50
