import numpy as np

from evaluation.attacks import predict, to_float
from evaluation.signs import SIGNS, draw_signs
from mlvgm.recipe import Recipe
from tests.evaluation.models import shipped


def test_about_a_dozen_signs_with_the_names_of_their_classes() -> None:
    classes = Recipe.read("road-signs").classes
    signs = draw_signs()
    assert len(signs) == len(SIGNS) >= 12
    for sign in signs:
        assert classes[sign.label] == sign.name
        assert sign.image.shape == (32, 32, 3)
        assert sign.image.dtype == np.uint8


def test_the_seed_decides_the_pictures() -> None:
    first, again, other = draw_signs(), draw_signs(), draw_signs(1)
    for a, b, c in zip(first, again, other, strict=True):
        assert np.array_equal(a.image, b.image)
        assert not np.array_equal(a.image, c.image)


def test_backgrounds_and_light_vary() -> None:
    corners = np.stack([sign.image[:3, :3].mean(axis=(0, 1)) for sign in draw_signs()])
    assert corners.std(axis=0).min() > 3


def test_the_classifier_reads_every_sign_rightly_and_surely() -> None:
    """It has been trained on photographs alone."""
    classifier = shipped().classifier
    signs = draw_signs()
    images = np.stack([sign.image for sign in signs])
    confidences = classifier(to_float(images)).softmax(dim=1).numpy()
    for sign, row in zip(signs, confidences, strict=True):
        assert row[sign.label] > 0.7, f"{sign.name}: {row[sign.label]:.2f}, highest is class {row.argmax()}"


def test_most_signs_are_read_rightly_in_other_lights_too() -> None:
    classifier = shipped().classifier
    signs = [sign for seed in range(1, 5) for sign in draw_signs(seed)]
    read = predict(classifier, np.stack([sign.image for sign in signs]))
    assert (read == [sign.label for sign in signs]).mean() > 0.95
