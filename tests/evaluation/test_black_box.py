import numpy as np
import pytest

from handlers.arrays import Pixels

pytest.importorskip("art")
pytest.importorskip("foolbox")

from evaluation.adaptive import Trace
from evaluation.attacks import AttackError, attack
from evaluation.black_box import HopSkipJump, Square
from evaluation.budgets import BUDGETS, threats
from evaluation.defences import Defence, Predictions, Subject
from tests.evaluation.models import target_of


def test_a_black_box_needs_no_gradient_and_stays_within_its_bound(subject: Subject, rows: dict[str, Defence]) -> None:
    def fail(*_: object) -> Trace:
        raise AssertionError("it took a gradient")

    asked: list[Pixels] = []

    def serve(images: Pixels, seeds: range) -> Predictions:
        asked.append(images)
        return rows["none"].serve(images, seeds)

    target = target_of(subject, Defence("none", "none", serve, fail))  # type: ignore[arg-type]
    found = Square("", 30, 4 / 255).run(target)
    assert sum(found["right"]) < 10
    assert 0 < found["queries"] <= 3 * 30 + 4
    whole = [images for images in asked if len(images) == 12]
    assert len(whole) > 2
    for images in whole:
        assert np.abs(images.astype(int) - target.images).max() <= 4


def test_labels_alone_lead_to_the_nearest_image(subject: Subject, rows: dict[str, Defence]) -> None:
    """Not so near as with gradients, but nearer than noise; and nobody is asked more often than allowed."""
    asked: list[Pixels] = []

    def serve(images: Pixels, seeds: range) -> Predictions:
        asked.append(images)
        found = rows["none"].serve(images, seeds)
        labels = np.eye(3, dtype=np.float32)[found.labels]  # the attack sees no more than labels
        return Predictions(found.labels, found.sample_labels, labels, found.flagged, found.scores, found.deviation)

    target = target_of(subject, Defence("none", "none", serve, None), 5)  # type: ignore[arg-type]
    found = HopSkipJump("", 300).run(target)
    assert found["right"] == [0] * 5
    assert found["l2"][:2] == [0, 0]
    nearest = attack(subject.classifier, target.images, target.labels, "deepfool").l2[2:]
    noise = np.random.default_rng(0).random(target.images[2:].shape) - target.images[2:] / 255
    far = np.sqrt((noise**2).sum(axis=(1, 2, 3)))
    for i in range(3):
        assert nearest[i] < found["l2"][2 + i] + 0.02
        assert found["l2"][2 + i] < 0.5 * far[i]
    assert 0 < found["queries"] <= 300 + 15
    assert sum(map(len, asked)) <= 5 + 3 * (300 + 15) + 5


def test_a_library_that_is_missing_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "art.attacks.evasion", None)
    monkeypatch.setitem(__import__("sys").modules, "foolbox", None)
    columns = threats(BUDGETS["quick"])
    for name, words in (
        ("square", "adversarial-robustness-toolbox"),
        ("hopskipjump", "adversarial-robustness-toolbox"),
        ("deepfool", "foolbox"),
    ):
        with pytest.raises(AttackError, match=words):
            columns[name].check()
    columns["white"].check()
