"""Comparators as rows of a report: what is served is what attackers meet, and their classifier is the one attacked."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from evaluation import changes, robustness_report
from evaluation.adaptive import Effort
from evaluation.attacks import predict, to_float
from evaluation.comparators import rows
from evaluation.comparators.training import ComparatorError
from evaluation.defences import Subject, defences
from evaluation.threats import Target, Transferred
from handlers.pipeline import Pipeline
from mlvgm.purifier import Autoencoder, Purified
from tests import bundles
from tests.evaluation.models import linear, of_bundle


class Dim(Autoencoder):
    """Half of the light, and a little noise."""

    image_size = 8
    noise_shapes = ((3, 8, 8), (1, 2, 2))

    def __init__(self) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def reconstruct(self, images: Tensor, noise: Sequence[Tensor]) -> Purified:
        shade = noise[1].mean(dim=(1, 2, 3), keepdim=True)
        return Purified(self.share * images + 0.02 * noise[0] + 0.02 * shade, (images,), (images,))


@pytest.fixture(scope="module")
def subject(nvae_bundle: Path) -> Subject:
    pipeline = Pipeline.load(nvae_bundle, runtime="onnxruntime")
    return Subject(pipeline, None, of_bundle(nvae_bundle))  # type: ignore[arg-type]  # nothing here asks for its gradients


def test_another_classifier_alone_and_behind_the_purifier(subject: Subject) -> None:
    other, images = linear(seed=5), bundles.images(40)
    found = rows.classifier(subject, "pgd", "trained", other, 3, None)
    assert list(found) == ["pgd", "served-pgd"]
    alone = found["pgd"].serve(images, range(40))
    assert np.array_equal(alone.labels, predict(other, images))
    assert not np.array_equal(alone.labels, predict(subject.classifier, images))
    purified = subject.pipeline.run(images, samples=3, seeds=range(40)).purified
    expected = np.stack([other(torch.from_numpy(purified[:, k])).numpy() for k in range(3)], axis=1)
    behind = found["served-pgd"].serve(images, range(40))
    assert np.array_equal(behind.sample_labels, expected.argmax(axis=2))
    assert found["served-pgd"].title == "linear schedule (served), vote of 3, trained"
    assert np.array_equal(
        defences(subject)["none"].serve(images, range(40)).labels, predict(subject.classifier, images)
    )


def test_transferred_attacks_know_the_classifier_of_the_row(subject: Subject) -> None:
    other, images = linear(seed=5), bundles.images(20)
    row = rows.classifier(subject, "pgd", "trained", other, 3, None)["pgd"]
    threat = Transferred("", "", changes.L2(1.0), Effort(5))

    def fooled(classifier: torch.nn.Module) -> int:
        """How many of the images that ``row`` reads rightly, it no longer does when ``classifier`` is attacked."""
        attacked = Target(subject, row, images, predict(other, images))
        if classifier is not other:
            attacked = Target(subject, defences(subject)["none"], images, predict(other, images))
        return sum(predict(other, threat._attacked(attacked)) != attacked.labels)

    assert fooled(other) > fooled(subject.classifier)
    assert fooled(other) >= 15


def test_an_autoencoder_votes_over_its_own_noise(subject: Subject) -> None:
    row, images = rows.autoencoder(subject, "avae", "A-VAE", Dim()), bundles.images(6)
    whole, part = row.serve(images, range(6)), row.serve(images[4:], range(4, 6))
    assert whole.sample_labels.shape == (6, rows.SAMPLES)
    assert whole.logits[4:] == pytest.approx(part.logits, abs=1e-4)
    assert 0.005 < whole.deviation.mean() < 0.05
    x = to_float(images).requires_grad_()
    logits = row.forward(x, 64).logits
    assert logits.shape == (64, 6, 3)
    assert np.abs(logits.mean(0).detach().numpy() - whole.logits).max() < 0.5
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.flatten(1).norm(dim=1).min() > 0


def test_cells_of_other_weights_are_other_cells(subject: Subject) -> None:
    one, other = (rows.classifier(subject, "pgd", "trained", linear(seed=s), 3, None) for s in (5, 6))
    assert one["pgd"].digest == one["served-pgd"].digest != other["pgd"].digest
    assert defences(subject)["served"].digest == ""


def test_what_cannot_be_compared_is_one_line(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(ComparatorError, match=r"holds no comparator NAME\.safetensors, of the names pgd, trades"):
        rows.comparators(subject, tmp_path, None, None)
    wide = Dim()
    wide.image_size = 16
    with pytest.raises(ComparatorError, match="A-VAE is for images of 16x16 pixels, the bundle for 8x8"):
        rows.autoencoder(subject, "avae", "A-VAE", wide)


def test_a_report_says_how_they_were_trained(tmp_path: Path) -> None:
    about = {"step": 7, "held_out": {"attacked": 0.5}}
    save_file({"weight": torch.zeros(1)}, tmp_path / "pgd.safetensors", {"about": json.dumps(about)})
    save_file({"weight": torch.zeros(1)}, tmp_path / "avae.safetensors")
    found = rows.training(tmp_path)
    assert found["pgd"] == about | {"sha256": hashlib.sha256((tmp_path / "pgd.safetensors").read_bytes()).hexdigest()}
    assert list(found) == ["pgd", "avae"]
    assert list(found["avae"]) == ["sha256"]
    lines = robustness_report._training({"training": found, "defences": {"pgd": "trained on attacks"}})
    assert f"| trained on attacks | 7 |  |  | attacked 50.0% | {found['pgd']['sha256'][:12]} |" in lines
