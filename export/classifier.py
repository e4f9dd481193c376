"""The ``classify`` stage, of any classifier: a published architecture, a user's module, or an ONNX file."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from export.fold import fold_batch_norms
from export.onnx_classifier import OnnxClassifier
from export.probe import PROBABILITIES, SMALLEST, Habits, probe
from export.stage import Stage
from handlers.manifest import TensorSpec


def stage(classifier: nn.Module, image_size: int, n_classes: int, say: Callable[[str], None] = lambda _: None) -> Stage:
    """``classify`` of a module that takes images (B, 3, H, W) in [0, 1] and returns logits (B, n_classes).

    Args:
        say: called with one line that says what was adapted, if anything.

    Raises:
        ClassifierError: the classifier does not return such logits.
    """
    inputs = (TensorSpec("images", ("B", 3, image_size, image_size)),)
    outputs = (TensorSpec("logits", ("B", n_classes)),)
    if isinstance(classifier, OnnxClassifier):
        adapted = classifier.adapted
        made = Stage("classify", classifier.graph, classifier, inputs, outputs, True, classifier.tolerance)
    else:
        habits = probe(classifier, image_size, n_classes, "the classifier")
        adapted = [*["modifies its input, so it gets a copy"] * habits.in_place]
        adapted += [PROBABILITIES] * habits.probabilities
        module = AdaptedClassifier(classifier, habits) if adapted else classifier
        made = Stage("classify", lambda: fold_batch_norms(module), module, inputs, outputs)
    if adapted:
        say(f"the classifier is adapted: it {'; it '.join(adapted)}")
    return made


class AdaptedClassifier(nn.Module):
    """A classifier that is given a copy of its input, and whose probabilities are turned into logits, as needed."""

    def __init__(self, classifier: nn.Module, habits: Habits) -> None:
        super().__init__()
        self.classifier, self.in_place, self.probabilities = classifier, habits.in_place, habits.probabilities

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(images.clone() if self.in_place else images)
        return torch.log(logits.float().clamp(min=SMALLEST)) if self.probabilities else logits
