"""The published models in eager PyTorch: the reference that every export and every engine is compared with.

from mlvgm import load_purifier, load_classifier
purifier = load_purifier("e4e", "e4e_ffhq_encode.pt")
classifier = load_classifier("resnet50", "resnet50_gender.pt", n_classes=2)
purified = purifier.purify(images, noise, alphas)
logits = classifier(purified.images)
"""

from mlvgm.checkpoint import CheckpointError
from mlvgm.load import Default, load_classifier, load_default, load_purifier
from mlvgm.purifier import Purified, Purifier

__all__ = [
    "CheckpointError",
    "Default",
    "Purified",
    "Purifier",
    "load_classifier",
    "load_default",
    "load_purifier",
]
