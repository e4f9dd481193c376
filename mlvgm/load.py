"""Load models by name: purifiers, classifiers, and the default model, whose weights are included."""

import importlib
import inspect
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor, nn

from handlers.errors import MlvgmError
from mlvgm.avae import read_avae
from mlvgm.e4e import read_e4e
from mlvgm.ndvae import read_ndvae
from mlvgm.nvae import read_nvae
from mlvgm.purifier import Autoencoder, Purifier
from mlvgm.recipe import Recipe
from mlvgm.resnet import read_resnet50, read_resnext50
from mlvgm.style_transformer import read_style_transformer
from mlvgm.vgg import read_vgg11

CLASSIFIERS: dict[str, Callable[[str | Path, int], nn.Module]] = {
    "resnet50": read_resnet50,
    "resnext50": read_resnext50,
    "vgg11": read_vgg11,
}


class ModelError(MlvgmError, ValueError):
    """There is no model of this name, or a callable returns none."""


@dataclass(frozen=True)
class Default:
    """A model with included weights: its references in eager PyTorch, the alphas it is served with, its recipe."""

    purifier: Purifier
    classifier: nn.Module
    alphas: list[float]
    recipe: Recipe


@overload
def load_purifier(family: str, path: str | Path, temperature: float = 0.6) -> Purifier: ...
@overload
def load_purifier(family: Literal["avae"], path: str | Path, *, image_size: int) -> Autoencoder: ...
@overload
def load_purifier(family: Literal["ndvae"], path: str | Path, *, h: Tensor) -> Autoencoder: ...
def load_purifier(
    family: str, path: str | Path, temperature: float = 0.6, *, image_size: int | None = None, h: Tensor | None = None
) -> Purifier | Autoencoder:
    """The purifier of a published checkpoint, ready for inference on the CPU.

    Args:
        family: "e4e", "style_transformer" or "nvae"; "avae" or "ndvae" for the baselines of the paper.
        path: the checkpoint as it was published.
        temperature: of the NVAE prior; for NVAE only.
        image_size: side of the images in pixels; for A-VAE only.
        h: the constant (1, C, h, w) from which the decoder starts; for ND-VAE only, whose files lack it.

    Raises:
        CheckpointError: the file cannot be used; the message names the file and the first offending key.
        ModelError: the family is unknown, or an argument that it needs is missing.
    """
    if family == "nvae":
        return read_nvae(path, temperature)
    if family == "e4e":
        return read_e4e(path)
    if family == "style_transformer":
        return read_style_transformer(path)
    if family == "avae":
        if image_size is None:
            raise ModelError("the family avae needs image_size: the side of its images in pixels")
        return read_avae(path, image_size)
    if family == "ndvae":
        if h is None:
            raise ModelError("the family ndvae needs h: the constant (1, C, h, w) that its decoder starts from")
        return read_ndvae(path, h)
    raise ModelError(f"unknown family {family!r}: one of e4e, style_transformer, nvae, avae, ndvae")


def load_classifier(architecture: str, path: str | Path, n_classes: int) -> nn.Module:
    """The classifier of a published checkpoint, for images in [0, 1]: it includes the normalisation.

    Args:
        architecture: "resnet50", "resnext50" or "vgg11".
        path: the checkpoint as it was published.
        n_classes: how many classes it must have.

    Raises:
        CheckpointError: the file cannot be used; the message names the file and the first offending key.
        ModelError: unknown architecture.
    """
    if architecture not in CLASSIFIERS:
        raise ModelError(f"unknown classifier {architecture!r}: one of {', '.join(CLASSIFIERS)}")
    return CLASSIFIERS[architecture](path, n_classes)


def load_callable(reference: str) -> nn.Module:
    """The module that the Python callable ``package.module:function`` returns, in eval mode.

    It is imported from the Python path or the current folder.

    Raises:
        ModelError: there is no such callable, it raises, needs arguments, or does not return a module.
    """
    where, colon, name = reference.partition(":")
    if not colon:
        parent, _, last = reference.rpartition(".")
        hint = f": did you mean {parent}:{last}?" if parent else ""
        raise ModelError(f"classifier {reference!r} is no module:function{hint}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = operator.attrgetter(name)(importlib.import_module(where))
        if isinstance(found, nn.Module):
            return _ready(found, reference)
        inspect.signature(found).bind()
    except ModuleNotFoundError as error:
        missing, own = str(error.name), f"{where}.".startswith(f"{error.name}.")
        cure = f"set PYTHONPATH to the folder that has it, or run from there (this is {here})" if own else "install it"
        raise ModelError(f"classifier {reference!r}: there is no module {missing!r}: {cure}") from None
    except AttributeError as error:
        raise ModelError(f"classifier {reference!r}: {_one_line(error)}") from None
    except TypeError as error:  # by `signature` or `bind`: it is not callable, or needs an argument
        raise ModelError(f"classifier {reference!r} must be a function without arguments: {_one_line(error)}") from None
    except (Exception, SystemExit) as error:
        raise ModelError(f"classifier {reference!r}: importing it raised {_one_line(error)}") from None
    try:
        result = found()
    except (Exception, SystemExit) as error:
        raise ModelError(f"classifier {reference!r} raised {_one_line(error)}") from None
    if not isinstance(result, nn.Module):
        raise ModelError(f"classifier {reference!r} returned a {type(result).__name__}, not a torch.nn.Module")
    return _ready(result, reference)


def _ready(module: nn.Module, reference: str) -> nn.Module:
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise ModelError(
            f"classifier {reference!r} is TorchScript, which cannot be traced: return the module it was made of"
        )
    return module.eval().requires_grad_(False)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def load_default(name: str = "road-signs") -> Default:
    """A model whose weights are included.

    Raises:
        RecipeError: there is no such recipe.
        ModelError: the recipe ships no weights.
    """
    recipe = Recipe.read(name)
    if recipe.purifier is None or recipe.classifier.file is None:
        raise ModelError(f"the recipe {name!r} ships no weights: load them with load_purifier and load_classifier")
    purifier = load_purifier(recipe.family, recipe.purifier, recipe.temperature)
    return Default(purifier, load_shipped_classifier(name), recipe.effective_alphas(), recipe)


def load_shipped_classifier(name: str) -> nn.Module:
    """The classifier of a model whose weights are included.

    Raises:
        RecipeError: there is no such recipe.
        ModelError: the recipe ships no weights.
    """
    recipe = Recipe.read(name)
    if recipe.classifier.file is None:
        raise ModelError(f"the recipe {name!r} ships no classifier: name a callable module:function")
    return load_classifier(recipe.classifier.architecture, recipe.classifier.file, len(recipe.classes))
