"""The two models that a recipe names, from its own files or the user's."""

from pathlib import Path

from torch import nn

from export.bundle import ExportError
from mlvgm.load import CLASSIFIERS, load_callable, load_classifier, load_purifier
from mlvgm.purifier import Purifier
from mlvgm.recipe import Recipe


def load_models(recipe: Recipe, purifier: Path | None, classifier: Path | None) -> tuple[Purifier, nn.Module | Path]:
    """Purifier and classifier of ``recipe``; the arguments, where given, replace the files it names.

    A classifier that is an ONNX file is returned as its path.

    Raises:
        ExportError: neither the recipe nor the arguments name a file.
        CheckpointError: a file cannot be used.
    """
    purifier_file = purifier or recipe.purifier
    if purifier_file is None:
        raise ExportError(f"recipe {recipe.name} ships no purifier: give its checkpoint with --purifier FILE")
    return (
        load_purifier(recipe.family, purifier_file, recipe.temperature),
        _load_classifier(recipe, classifier),
    )


def _load_classifier(recipe: Recipe, file: Path | None) -> nn.Module | Path:
    architecture = recipe.classifier.architecture
    if ":" in architecture:
        return load_callable(architecture)
    file = file or recipe.classifier.file
    if file is None:
        raise ExportError(f"recipe {recipe.name} ships no classifier: give its checkpoint with --classifier FILE")
    if architecture == "onnx":
        return file
    if architecture not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise ExportError(
            f"recipe {recipe.name}: classifier {architecture!r} is none of {known}, onnx, module:function"
        )
    return load_classifier(architecture, file, len(recipe.classes))
