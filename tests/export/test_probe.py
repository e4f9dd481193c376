"""What a few random images tell about a classifier, before any long work."""

import pytest
import torch
from torch import Tensor, nn

from export.probe import ClassifierError, Habits, probe


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), *layers, nn.ReLU(), nn.Linear(16, 4))


PLAIN = network().requires_grad_(False)


@pytest.mark.parametrize(
    "classifier",
    [
        network(nn.BatchNorm1d(16)).train(),
        network(nn.Dropout(0.5)).train(),
        lambda images: PLAIN(images) - PLAIN(images).mean(dim=0),
        lambda images: PLAIN(images) + torch.randn(len(images), 4),
    ],
    ids=["batch normalisation", "dropout", "mean of the batch", "random numbers"],
)
def test_answers_that_depend_on_the_batch_or_on_chance_are_refused(classifier: nn.Module) -> None:
    with pytest.raises(ClassifierError, match=r"mine: (answers otherwise|fails on images)"):
        probe(classifier, 8, 4, "mine")


def test_ordinary_classifiers_are_ordinary() -> None:
    habits = probe(network(nn.BatchNorm1d(16), nn.Dropout(0.5)).eval(), 8, 4, "mine")
    assert habits == Habits(probabilities=False, in_place=False)


@pytest.mark.parametrize("last", [nn.Softmax(dim=1), nn.Sigmoid()])
def test_probabilities_are_told_from_logits(last: nn.Module) -> None:
    assert probe(nn.Sequential(PLAIN, last), 8, 4, "mine").probabilities
    assert not probe(PLAIN, 8, 4, "mine").probabilities


def test_habits_are_told() -> None:
    def classifier(images: Tensor) -> Tensor:
        return PLAIN(images.mul_(2)).softmax(dim=1)

    assert probe(classifier, 8, 4, "mine") == Habits(probabilities=True, in_place=True)
