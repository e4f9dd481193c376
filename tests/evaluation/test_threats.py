import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import defences
from evaluation.adaptive import Effort, Trace, ascend
from evaluation.attacks import attack, predict, to_float
from evaluation.changes import L2, Flow
from evaluation.defences import Defence, Predictions, Subject
from evaluation.threats import Certified, Clean, Engine, Quiet, Seeded, Target, Transferred, White
from handlers.arrays import Pixels
from handlers.pipeline import Pipeline
from tests import bundles
from tests.evaluation.models import Linear, pictures, target_of

pytest.importorskip("foolbox")


def _of(labels: Callable[[Pixels, list[int]], np.ndarray], classifier: Linear) -> Defence:
    """A defence that is read as ``labels`` says, by images and seeds, and has the gradients of ``classifier``."""

    def serve(images: Pixels, seeds: object) -> Predictions:
        found = labels(images, list(seeds))  # type: ignore[call-overload]
        zero = np.zeros(len(images), np.float32)
        return Predictions(found, found[:, None], np.eye(3, dtype=np.float32)[found], zero > 0, zero, zero)

    return Defence("own", "own", serve, lambda x, _: Trace(classifier(x)[None]), True)


def test_clean_images_and_noisy_ones(subject: Subject, rows: dict[str, Defence]) -> None:
    target = target_of(subject, rows["none"])
    quiet = Clean("clean").run(target)
    assert quiet["right"] == [0, 0, *[1] * 10]
    assert quiet["agrees"] == [1] * 12
    assert quiet["l2"] == [0] * 12
    loud = Clean("noise", 0.25).run(target)
    noisy = defences.gaussian(target.images, 0.25, range(12))
    assert loud["right"] == (rows["none"].serve(noisy, range(12)).labels == target.labels).astype(int).tolist()
    assert min(loud["l2"]) > 1


def test_transferred_images_are_those_of_the_classifier(subject: Subject, rows: dict[str, Defence]) -> None:
    target = target_of(subject, rows["blur"])
    attacked = attack(subject.classifier, target.images, target.labels, "deepfool")
    found = Transferred("DeepFool", "deepfool").run(target)
    assert found["right"] == (rows["blur"].serve(attacked.images, range(12)).labels == target.labels).tolist()
    assert found["l2"] == pytest.approx(attacked.l2.tolist(), abs=1e-4)


def test_transferred_images_within_a_bound_are_kept(subject: Subject, rows: dict[str, Defence], tmp_path: Path) -> None:
    threat = Transferred("", "", L2(0.3), Effort(5, 2))
    target = Target(**{**target_of(subject, rows["none"]).__dict__, "cache": tmp_path})
    first = threat.run(target)
    assert max(first["l2"]) < 0.3 + np.sqrt(3 * 8 * 8 / 12) / 255
    assert sum(first["right"]) < 10
    assert len(list(tmp_path.iterdir())) == 1
    assert threat.run(target) == first
    assert len(list(tmp_path.iterdir())) == 1


def test_who_may_try_again_needs_one_wrong_answer(subject: Subject) -> None:
    target = target_of(
        subject, _of(lambda images, seeds: (np.array(seeds) // 1_000_003 % 4 == 3).astype(np.int64), linear_of(subject))
    )
    target = Target(subject, target.defence, target.images, np.zeros(12, np.int64))
    once = Transferred("", "", L2(0.3), Effort(1), 1).run(target)
    often = Transferred("", "", L2(0.3), Effort(1), 4).run(target)
    assert once["right"] == [1] * 12
    assert often["right"] == [0] * 12


def linear_of(subject: Subject) -> Linear:
    assert isinstance(subject.classifier, Linear)
    return subject.classifier


def test_a_white_box_is_judged_as_served_and_goes_on_with_what_resists(
    subject: Subject, rows: dict[str, Defence]
) -> None:
    target = target_of(subject, rows["none"])
    found = White("", L2(0.2), Effort(5, 3)).run(target)
    weights, logits = linear_of(subject).weights, linear_of(subject)(to_float(target.images))
    for i in range(2, 12):
        label = int(target.labels[i])
        near = min(
            float((logits[i, label] - logits[i, other]) / (weights[:, label] - weights[:, other]).norm())
            for other in {0, 1, 2} - {label}
        )
        if abs(near - 0.2) > 0.07:  # what rounding to 8 bits can move
            assert found["right"][i] == (near > 0.2), (i, near)
    assert found["right"][:2] == [0, 0]
    assert found["l2"][:2] == [0, 0]
    assert sum(found["broken"]) == 10 - sum(found["right"])
    assert found["gradients"]["zero"] == {"images": 0, "classify": 0}


def test_a_short_ascent_takes_what_falls_easily(subject: Subject, rows: dict[str, Defence]) -> None:
    """Long ones, which cost more draws, see the rest only."""
    asked: list[tuple[int, int]] = []

    def forward(images: torch.Tensor, draws: int) -> Trace:
        asked.append((len(images), draws))
        return rows["none"].forward(images, draws)

    target = target_of(subject, Defence("none", "none", rows["none"].serve, forward))
    found = White("", L2(0.04), Effort(20, 2)).run(target)
    assert sum(found["broken"]) == 10 - sum(found["right"])
    sizes = [size for size, _ in asked[2:]]  # two look at the gradients
    assert sizes[:11] == [10] * 11
    assert set(sizes[11:32]) == {10 - found["broken"][0]}
    assert found["broken"][0] > 0


def test_some_images_of_a_target_keep_their_noise(subject: Subject, rows: dict[str, Defence]) -> None:
    target = dataclasses.replace(target_of(subject, rows["served"]), first=7)
    some = target.only(np.array([1, 4, 6]))
    twice = some.only(np.array([0, 2]))
    assert some.places.tolist() == [8, 11, 13]
    assert twice.places.tolist() == [8, 13]
    whole, part = target.predict(target.images), twice.predict(twice.images)
    assert np.allclose(whole.logits[[1, 6]], part.logits)
    assert twice.labels.tolist() == target.labels[[1, 6]].tolist()


def test_draws_are_raised_until_gradients_agree(subject: Subject) -> None:
    weights = linear_of(subject).weights

    def noisy(x: torch.Tensor, draws: int) -> Trace:
        own = weights + 2 * torch.randn(draws, *weights.shape)
        return Trace(torch.einsum("bi,sic->sbc", x.flatten(1), own))

    quiet = _of(lambda images, _: predict(subject.classifier, images), linear_of(subject))
    random = Defence("own", "own", quiet.serve, noisy, True)
    fixed = Defence("own", "own", quiet.serve, quiet.forward)
    threat = White("", L2(0.2), Effort(1, 1, 256))
    draws = [threat.run(target_of(subject, defence))["draws"] for defence in (fixed, quiet, random)]
    assert draws[:2] == [1, 1]
    assert 8 <= draws[2] <= 256


def test_who_chooses_the_seed_knows_the_noise(subject: Subject) -> None:
    """Each seed has a direction that breaks the defence; averaged over seeds there is none."""
    bare, asked = linear_of(subject), set[tuple[int, ...]]()

    def direction(seeds: list[int]) -> torch.Tensor:
        own = [np.random.default_rng(seed).standard_normal((192, 3), np.float32) for seed in seeds]
        return torch.from_numpy(np.stack(own))

    def serve(images: Pixels, seeds: list[int]) -> Predictions:
        logits = torch.einsum("bi,bic->bc", (to_float(images) - 0.5).flatten(1), direction(list(seeds)))
        return Predictions.of(logits.numpy()[:, None], bare(to_float(images)).numpy())

    def seeded(images: torch.Tensor, draws: int, seeds: list[int]) -> Trace:
        asked.add(tuple(seeds))
        logits = torch.einsum("bi,bic->bc", (images - 0.5).flatten(1), direction(seeds))
        return Trace(logits[None].repeat(draws, 1, 1))

    others = np.random.default_rng(7)

    def averaged(images: torch.Tensor, draws: int) -> Trace:
        return seeded(images, draws, others.integers(1 << 40, size=len(images)).tolist())

    images = pictures(12)
    labels = serve(images, list(range(12))).labels
    row = Defence("own", "own", serve, averaged, True, seeded=seeded)
    target = Target(subject, row, images, labels)
    found = Seeded("", L2(0.5), Effort(10, 1)).run(target)
    assert sum(found["right"]) == 0
    assert asked == {tuple(range(12))}
    # To whoever cannot compute the noise, another seed is another classifier.
    assert sum(White("", L2(0.5), Effort(10, 1)).run(target)["right"]) > 0
    without = Defence("own", "own", serve, averaged, True)
    assert Seeded("", L2(0.5), Effort(1)).forward(Target(subject, without, images, labels), np.arange(3)) is averaged


def test_engines_decide_where_they_differ_from_the_reference(subject: Subject) -> None:
    """The reference believes every image to be misread from the start; the engines know better."""
    bare = linear_of(subject)

    def serve(images: Pixels, _: object) -> Predictions:
        logits = bare(to_float(images)).numpy()
        return Predictions.of(logits[:, None], logits)

    images = pictures(12)
    labels = predict(bare, images)
    shift = torch.zeros(12, 3)
    shift[torch.arange(12), torch.from_numpy(labels)] = -1e4

    def forward(images: torch.Tensor, _: int) -> Trace:
        return Trace(bare(images)[None] + shift[: len(images)])

    target = Target(subject, Defence("own", "own", serve, forward), images, labels)
    assert sum(Engine("", L2(0.5), Effort(10, 1)).run(target)["right"]) == 0
    kept = [White, Engine]
    margins = [
        ascend(
            kind("", L2(0.5), Effort(3)).forward(target, np.arange(12)),
            to_float(images),
            torch.from_numpy(labels),
            L2(0.5),
            Effort(3),
        ).margins
        for kind in kept
    ]
    assert (margins[0] < -1000).all()
    assert (margins[1] > -1000).all()


def test_who_knows_the_score_is_found_less(subject: Subject) -> None:
    """The classifier behind the defence differs from the bare one: what fools one need not fool the other."""
    bare = linear_of(subject)
    weights = np.random.default_rng(5).standard_normal(tuple(bare.weights.shape), np.float32)
    behind = Linear((0.7 * bare.weights.numpy() + 0.7 * weights).astype(np.float32))

    def serve(images: Pixels, _: object) -> Predictions:
        pixels = to_float(images)
        return Predictions.of(behind(pixels).numpy()[:, None], bare(pixels).numpy())

    defence = Defence("own", "own", serve, lambda x, _: Trace(behind(x)[None]))
    images = pictures(24)
    target = Target(subject, defence, images, predict(behind, images))
    white, quiet = (kind("", L2(1.0), Effort(15, 2)).run(target) for kind in (White, Quiet))
    clean = Clean("").run(target)
    known = Quiet("").penalty(target)(to_float(images), behind(to_float(images))[None])
    assert np.allclose(known.numpy(), clean["score"], atol=1e-4)
    assert sum(white["right"]) == sum(quiet["right"]) == 0
    assert np.mean(quiet["score"]) < 0.5 * np.mean(white["score"])
    assert np.mean(quiet["score"]) < np.mean(clean["score"])
    assert Quiet.meets_all
    assert "score" in Quiet.knows


def test_changes_that_add_nothing(subject: Subject, rows: dict[str, Defence]) -> None:
    found = White("", Flow(1.0), Effort(8, 2)).run(target_of(subject, rows["none"]))
    assert sum(found["right"]) < 10


def test_certified_radii_are_those_of_a_linear_classifier(tmp_path: Path) -> None:
    """With two classes the probability under noise, and so the true radius, is the distance to the boundary."""
    weights = np.zeros((192, 3), np.float32)
    weights[:, 0], weights[:, 1], weights[:, 2] = 1, -1, -1e6 / 192
    images = np.full((2, 8, 8, 3), 128, np.uint8)
    images[0] += 4
    bundles.write_plain(tmp_path, weights)
    pipeline = Pipeline.load(tmp_path, runtime="onnxruntime")
    subject = Subject(pipeline, None, Linear(weights))  # type: ignore[arg-type]
    row = defences.defences(subject)["none"]
    found = Certified("", sigma=0.1, draws=500).run(Target(subject, row, images, np.zeros(2, np.int64)))
    true = (132 / 255 - 0.5) * np.sqrt(192)
    assert found["right"][0] == 1
    assert 0.6 * true < found["radius"][0] < true
    wrong = Certified("", sigma=0.1, draws=500).run(Target(subject, row, images, np.ones(2, np.int64)))
    assert wrong["radius"] == [0, 0]
