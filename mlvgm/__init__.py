"""The published models in eager PyTorch: the reference that every export and every engine is compared with.

from mlvgm import load_purifier, load_classifier
purifier = load_purifier("e4e", "e4e_ffhq_encode.pt")
classifier = load_classifier("resnet50", "resnet50_gender.pt", n_classes=2)
purified = purifier.purify(images, noise, alphas)
logits = classifier(purified.images)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlvgm.checkpoint import CheckpointError
    from mlvgm.load import Default, ModelError, load_classifier, load_default, load_purifier
    from mlvgm.purifier import Purified, Purifier
    from mlvgm.recipe import Recipe, RecipeError

__all__ = [
    "CheckpointError",
    "Default",
    "ModelError",
    "Purified",
    "Purifier",
    "Recipe",
    "RecipeError",
    "load_classifier",
    "load_default",
    "load_purifier",
]

_HOMES = {
    "CheckpointError": "checkpoint",
    "Default": "load",
    "ModelError": "load",
    "Purified": "purifier",
    "Purifier": "purifier",
    "Recipe": "recipe",
    "RecipeError": "recipe",
    "load_classifier": "load",
    "load_default": "load",
    "load_purifier": "load",
}


def __getattr__(name: str) -> Any:
    """Import what was asked for: the command line, which lies in this package, runs without PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mlvgm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mlvgm.{_HOMES[name]}"), name)
