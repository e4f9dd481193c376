import numpy as np
import torch

from evaluation.adaptive import PgdSettings, attack_within, bare, defended
from evaluation.attacks import predict, to_float
from mlvgm.load import Default
from tests.evaluation.models import linear, pictures, shipped


def test_stays_in_the_ball_and_reaches_its_edge() -> None:
    classifier, images = linear(), pictures(6)
    labels = predict(classifier, images)
    attacked = attack_within(bare(classifier), images, labels, PgdSettings(l2=0.3, steps=10))
    change = (to_float(attacked) - to_float(images)).flatten(1).norm(dim=1)
    rounding = np.sqrt(3 * 8 * 8 / 12) / 255
    assert (change < 0.3 + 2 * rounding).all()
    assert (change > 0.25).all()


def test_lowers_the_margin_as_far_as_a_linear_classifier_allows() -> None:
    classifier, images = linear(classes=2), pictures(6)
    labels = predict(classifier, images)
    attacked = attack_within(bare(classifier), images, labels, PgdSettings(l2=0.3, steps=20))

    def margins(pictures: np.ndarray) -> np.ndarray:
        logits = classifier(to_float(pictures)).numpy()
        return logits[np.arange(6), labels] - logits[np.arange(6), 1 - labels]

    possible = 0.3 * np.linalg.norm(classifier.weights[:, 0] - classifier.weights[:, 1])
    assert (margins(images) - margins(attacked) > 0.95 * possible).all()


def test_the_seed_decides_the_attack() -> None:
    classifier, images = linear(), pictures(3)
    labels = predict(classifier, images)
    runs = [attack_within(bare(classifier), images, labels, PgdSettings(0.3, 3, seed)) for seed in (0, 0, 1)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_goes_through_the_whole_defence_with_fresh_noise() -> None:
    default = shipped()
    default = Default(default.purifier, default.classifier, [0.5] * default.purifier.n_latents, default.recipe)
    logits = defended(default, samples=3, seed=0)
    images = to_float(pictures(2, side=32)).requires_grad_()
    read = logits(images)
    assert read.shape == (3, 2, len(default.recipe.classes))
    assert not torch.allclose(read[0], read[1])
    assert not torch.allclose(read, logits(images))
    (gradient,) = torch.autograd.grad(read.sum(), images)
    assert gradient.flatten(1).norm(dim=1).min() > 0
