import numpy as np

from evaluation.attacks import to_float
from evaluation.signs import drawn_signs
from mlvgm.recipe import Recipe
from tests.evaluation.models import shipped


def test_fourteen_signs_with_the_names_of_their_classes() -> None:
    classes = Recipe.read("road-signs").classes
    signs = drawn_signs()
    assert len({sign.label for sign in signs}) == len(signs) == 14
    for sign in signs:
        assert classes[sign.label] == sign.name
        assert sign.image.shape == (32, 32, 3)
        assert sign.image.dtype == np.uint8


def test_the_classifier_reads_every_sign_rightly_and_surely() -> None:
    """It has been trained on photographs alone."""
    classifier = shipped().classifier
    signs = drawn_signs()
    images = np.stack([sign.image for sign in signs])
    confidences = classifier(to_float(images)).softmax(dim=1).numpy()
    for sign, row in zip(signs, confidences, strict=True):
        assert row[sign.label] > 0.7, f"{sign.name}: {row[sign.label]:.2f}, highest is class {row.argmax()}"
