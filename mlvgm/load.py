"""Loading models by name: purifiers, classifiers, and the default model that is shipped."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mlvgm.e4e import read_e4e
from mlvgm.nvae import read_nvae
from mlvgm.purifier import Purifier
from mlvgm.recipe import Recipe
from mlvgm.resnet import read_resnet50, read_resnext50
from mlvgm.style_transformer import read_style_transformer
from mlvgm.vgg import read_vgg11

CLASSIFIERS: dict[str, Callable[[str | Path, int], nn.Module]] = {
    "resnet50": read_resnet50,
    "resnext50": read_resnext50,
    "vgg11": read_vgg11,
}


@dataclass(frozen=True)
class Default:
    """A shipped model as eager twins, with the weights a_i that it is served with, and its recipe."""

    purifier: Purifier
    classifier: nn.Module
    alphas: list[float]
    recipe: Recipe


def load_purifier(family: str, path: str | Path, temperature: float = 0.6) -> Purifier:
    """The purifier of a published checkpoint, ready for inference on the CPU.

    Args:
        family: "e4e", "style_transformer" or "nvae".
        path: the checkpoint as it was published.
        temperature: of the NVAE prior; the other families have none.

    Raises:
        CheckpointError: the file cannot be used; the message names the file and the first offending key.
        ValueError: unknown family.
    """
    if family == "nvae":
        return read_nvae(path, temperature)
    if family == "e4e":
        return read_e4e(path)
    if family == "style_transformer":
        return read_style_transformer(path)
    raise ValueError(f"unknown family {family!r}: one of e4e, style_transformer, nvae")


def load_classifier(architecture: str, path: str | Path, n_classes: int) -> nn.Module:
    """The classifier of a published checkpoint; it normalises images in [0, 1] by itself.

    Args:
        architecture: "resnet50", "resnext50" or "vgg11".
        path: the checkpoint as it was published.
        n_classes: how many classes it must have.

    Raises:
        CheckpointError: the file cannot be used; the message names the file and the first offending key.
        ValueError: unknown architecture.
    """
    if architecture not in CLASSIFIERS:
        raise ValueError(f"unknown classifier {architecture!r}: one of {', '.join(CLASSIFIERS)}")
    return CLASSIFIERS[architecture](path, n_classes)


def load_callable(reference: str) -> nn.Module:
    """The module that the Python callable ``package.module:function`` returns, in eval mode.

    Raises:
        ValueError: there is no such callable, or it returns something else.
    """
    module, _, function = reference.partition(":")
    try:
        result = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"classifier {reference!r} cannot be called: {error}") from None
    if not isinstance(result, nn.Module):
        raise ValueError(f"classifier {reference!r} returned a {type(result).__name__}, not a torch.nn.Module")
    return result.eval().requires_grad_(False)


def load_default(name: str = "road-signs") -> Default:
    """A model that is shipped with its weights.

    Raises:
        RecipeError: there is no such recipe.
        ValueError: the recipe ships no weights.
    """
    recipe = Recipe.read(name)
    if recipe.purifier is None or recipe.classifier.file is None:
        raise ValueError(f"the recipe {name!r} ships no weights: load them with load_purifier and load_classifier")
    purifier = load_purifier(recipe.family, recipe.purifier, recipe.temperature)
    classifier = load_classifier(recipe.classifier.architecture, recipe.classifier.file, len(recipe.classes))
    return Default(purifier, classifier, recipe.effective_alphas(), recipe)
