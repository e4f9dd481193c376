"""Load the two models that a recipe names, from its own files or the user's."""

from pathlib import Path

from torch import nn

from export.bundle import ExportError
from export.onnx_classifier import OnnxClassifier
from mlvgm.load import load_callable, load_classifier, load_purifier
from mlvgm.purifier import Purifier
from mlvgm.recipe import Recipe


def load_models(recipe: Recipe, purifier: Path | None, classifier: Path | None) -> tuple[Purifier, nn.Module]:
    """Purifier and classifier of ``recipe``; files given as arguments replace those that the recipe names.

    Raises:
        ExportError: neither the recipe nor the arguments name an existing file.
        CheckpointError, ModelError, ClassifierError: a file or callable cannot be used.
    """
    file = _file(recipe, "purifier", purifier or recipe.purifier)
    loaded = recipe_classifier(recipe, classifier)
    return load_purifier(recipe.family, file, recipe.temperature), loaded


def recipe_classifier(recipe: Recipe, file: Path | None = None) -> nn.Module:
    """The classifier of ``recipe``, from ``file`` if given: images (B, 3, H, W) in [0, 1] -> logits (B, C).

    Raises:
        ExportError: neither the recipe nor the argument names an existing file.
        CheckpointError, ModelError, ClassifierError: a file or callable cannot be used.
    """
    architecture = recipe.classifier.architecture
    if ":" in architecture:
        return load_callable(architecture)
    file = _file(recipe, "classifier", file or recipe.classifier.file)
    if architecture == "onnx":
        return OnnxClassifier(file, recipe.classifier, recipe.image_size, len(recipe.classes))
    return load_classifier(architecture, file, len(recipe.classes))


def _file(recipe: Recipe, name: str, file: Path | None) -> Path:
    if file is None:
        raise ExportError(f"recipe {recipe.name} ships no {name}: give its checkpoint with --{name} FILE")
    if not file.is_file():
        raise ExportError(f"recipe {recipe.name}: {name} {file}: no such file")
    return file
