"""The two models that a recipe names, from its own files or the user's."""

from pathlib import Path

from torch import nn

from export.bundle import ExportError
from mlvgm.load import load_callable, load_classifier, load_purifier
from mlvgm.purifier import Purifier
from mlvgm.recipe import Recipe


def load_models(recipe: Recipe, purifier: Path | None, classifier: Path | None) -> tuple[Purifier, nn.Module | Path]:
    """Purifier and classifier of ``recipe``; the arguments, where given, replace the files it names.

    A classifier that is an ONNX file is returned as its path.

    Raises:
        ExportError: neither the recipe nor the arguments name a file that is there.
        CheckpointError: a file cannot be used.
    """
    architecture = recipe.classifier.architecture
    purifier = _file(recipe, "purifier", purifier or recipe.purifier)
    if ":" in architecture:
        built = load_callable(architecture)
        return load_purifier(recipe.family, purifier, recipe.temperature), built
    classifier = _file(recipe, "classifier", classifier or recipe.classifier.file)
    loaded = load_purifier(recipe.family, purifier, recipe.temperature)
    if architecture == "onnx":
        return loaded, classifier
    return loaded, load_classifier(architecture, classifier, len(recipe.classes))


def _file(recipe: Recipe, name: str, file: Path | None) -> Path:
    if file is None:
        raise ExportError(f"recipe {recipe.name} ships no {name}: give its checkpoint with --{name} FILE")
    if not file.is_file():
        raise ExportError(f"recipe {recipe.name}: {name} {file}: no such file")
    return file
