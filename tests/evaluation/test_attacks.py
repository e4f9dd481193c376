import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation import attacks
from evaluation.attacks import (
    MARGIN,
    METHODS,
    AttackError,
    CarliniWagner,
    DeepFool,
    Method,
    attack,
    cached,
    predict,
    to_bytes,
    to_float,
)
from tests.evaluation.models import linear, pictures

foolbox = pytest.importorskip("foolbox")


class Constant(nn.Module):
    """Always reads class 0, whatever it sees: no attack can succeed."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0]).expand(len(images), -1) + 0 * images.sum()


def test_to_bytes_and_back() -> None:
    images = pictures(3)
    assert np.array_equal(to_bytes(to_float(images)), images)
    assert np.array_equal(to_bytes(torch.tensor([-0.2, 1.3, 0.5]).view(1, 3, 1, 1)).ravel(), [0, 255, 128])


@pytest.mark.parametrize("method", list(METHODS))
def test_fools_every_image_after_rounding(method: str) -> None:
    classifier, images = linear(), pictures(20)
    labels = predict(classifier, images)
    result = attack(classifier, images, labels, method)
    assert result.fooled.all()
    assert result.images.dtype == np.uint8
    assert result.images.shape == images.shape
    assert (predict(classifier, result.images) != labels).all()
    logits = classifier(to_float(result.images)).numpy()
    assert (logits.max(axis=1) - logits[np.arange(20), labels] > MARGIN).all()
    difference = (result.images.astype(np.float64) - images) / 255
    assert result.l2 == pytest.approx(np.linalg.norm(difference.reshape(20, -1), axis=1), rel=1e-5)


@pytest.mark.parametrize("method", list(METHODS))
def test_is_close_to_the_nearest_boundary(method: str) -> None:
    classifier, images = linear(), pictures(20)
    labels = predict(classifier, images)
    logits, weights = classifier(to_float(images)).numpy(), classifier.weights.numpy()
    nearest = np.full(20, np.inf)
    for i, label in enumerate(labels):
        for other in set(range(3)) - {int(label)}:
            distance = (logits[i, label] - logits[i, other]) / np.linalg.norm(weights[:, label] - weights[:, other])
            nearest[i] = min(nearest[i], distance)
    result = attack(classifier, images, labels, method)
    rounding = np.sqrt(3 * 8 * 8 / 12) / 255
    assert (result.l2 > 0.8 * nearest).all()
    assert np.median(result.l2 / (nearest + rounding)) < 1.6


def test_an_image_that_is_misread_already_stays_as_it_is() -> None:
    classifier, images = linear(), pictures(6)
    wrong = (predict(classifier, images) + 1) % 3
    for method in METHODS:
        result = attack(classifier, images, wrong, method)
        assert result.fooled.all()
        assert np.array_equal(result.images, images)
        assert not result.l2.any()


@pytest.mark.parametrize("method", [DeepFool(rounds=(2, 3)), CarliniWagner(searches=2, steps=5)])
def test_where_the_attack_fails_the_image_stays_as_it_is(method: Method) -> None:
    images = pictures(3)
    result = attack(Constant(), images, np.zeros(3, np.int64), method)
    assert not result.fooled.any()
    assert np.array_equal(result.images, images)
    assert not result.l2.any()


@pytest.mark.parametrize(("share", "held"), [(0.7, True), (0.2, False)])
def test_a_perturbation_that_falls_short_is_prolonged_up_to_a_limit(share: float, held: bool) -> None:
    """``share`` of the way to the boundary: 0.7 of it need be prolonged 1.5 times, 0.2 of it more than is allowed."""
    classifier, images = linear(classes=2), pictures(8)
    normal = classifier.weights[:, 1] - classifier.weights[:, 0]
    logits = classifier(to_float(images))
    distance = (logits[:, 1] - logits[:, 0]) / normal.norm()
    images, distance = images[distance.abs().numpy() > 0.1], distance[distance.abs() > 0.1]  # more than rounding is
    labels = torch.from_numpy(predict(classifier, images))
    step = (-distance[:, None] * normal / normal.norm()).view(-1, 3, 8, 8)
    clean = to_float(images)
    result = attacks._survive_rounding(classifier, clean, clean + share * step, labels)
    if held:
        assert (predict(classifier, result) != labels.numpy()).all()
    else:
        assert np.array_equal(result, images)


def test_rounds_change_nothing_but_the_time() -> None:
    classifier, images = linear(classes=5), pictures(10)
    labels = predict(classifier, images)
    at_once = attack(classifier, images, labels, DeepFool(rounds=(50,)))
    assert np.array_equal(at_once.images, attack(classifier, images, labels, DeepFool(rounds=(1, 50))).images)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, images = linear(), pictures(7)
    labels = predict(classifier, images)
    whole = attack(classifier, images, labels, "deepfool")
    monkeypatch.setattr(attacks, "_CHUNK", 3)
    assert np.array_equal(attack(classifier, images, labels, "deepfool").images, whole.images)


def test_what_was_computed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(4)
    labels = predict(linear(), images)
    first = attack(linear(), images, labels, "deepfool", tmp_path)

    def fail(*_: object) -> None:
        raise AssertionError("attacked again")

    monkeypatch.setattr(attacks, "_attack_chunk", fail)
    again = attack(linear(), images, labels, "deepfool", tmp_path)
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.l2, again.l2)
    for other in (lambda: attack(linear(seed=1), images, labels, "deepfool", tmp_path),
                  lambda: attack(linear(), images, labels, DeepFool(overshoot=0.5), tmp_path),
                  lambda: attack(linear(), images, (labels + 1) % 3, "deepfool", tmp_path),
                  lambda: attack(linear(), images[::-1], labels, "deepfool", tmp_path)):  # fmt: skip
        with pytest.raises(AssertionError, match="again"):
            other()


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(AttackError, match="deepfool, cw"):
        attack(linear(), pictures(1), np.zeros(1, np.int64), "fgsm")


def test_a_draft_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both write at once: neither takes away, nor reads, what the other has not finished."""
    images, labels, save = pictures(2), np.zeros(2, np.int64), np.savez_compressed

    def meanwhile(file: BinaryIO, images: np.ndarray) -> None:
        assert np.array_equal(cached(tmp_path, "key", images, labels, lambda: images), images)
        save(file, images=images)

    monkeypatch.setattr(np, "savez_compressed", meanwhile)
    assert np.array_equal(cached(tmp_path, "key", images, labels, lambda: images), images)
    assert len(list(tmp_path.iterdir())) == 1
    assert np.array_equal(cached(tmp_path, "key", images, labels, lambda: pytest.fail("made again")), images)


@pytest.mark.parametrize("left", [0, 50, 200])
def test_a_stored_result_that_is_damaged_is_made_anew(left: int, tmp_path: Path) -> None:
    images, labels = pictures(2), np.zeros(2, np.int64)
    cached(tmp_path, "key", images, labels, lambda: images)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:left])
    assert np.array_equal(cached(tmp_path, "key", images, labels, lambda: images), images)
    assert np.array_equal(cached(tmp_path, "key", images, labels, lambda: pytest.fail("made again")), images)
    for other in (images[:1], images.astype(np.float32)):
        np.savez(file, images=other)
        assert np.array_equal(cached(tmp_path, "key", images, labels, lambda: images), images)
    file.unlink()
    os.mkfifo(file)
    assert np.array_equal(cached(tmp_path, "key", images, labels, lambda: images), images)
