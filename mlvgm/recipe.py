"""Recipes: all settings of a pipeline except its weights."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from handlers import runtimes
from handlers.errors import MlvgmError
from handlers.fields import FieldError, Length, Range, none_of, read_strict
from handlers.manifest import Batch, Name, Samples, Stored
from mlvgm.yaml_file import read_yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "export" / "recipes"

ARCHITECTURES = ("onnx", "resnet50", "resnext50", "vgg11")

Classes = Annotated[tuple[Annotated[str, Length(1, 200)], ...], Length(2, 100_000)]
Fraction = Annotated[float, Range(0.0, 1.0)]
ThreeNumbers = tuple[float, float, float]
Deviation = Annotated[float, Range(0.0, exclusive=True)]


class RecipeError(MlvgmError, ValueError):
    """There is no such recipe, or a field of it is wrong."""


@dataclass(frozen=True)
class ClassifierRecipe:
    """The classifier of the purified images.

    Attributes:
        architecture: a published one (resnet50, resnext50, vgg11), "onnx", or a callable ``package.module:function``
            that returns a `torch.nn.Module`.
        file: its weights; None if they are given at export. In a YAML file, the path is relative to that file.
        mean, std: of each channel, for the normalisation of an ONNX classifier's inputs; other classifiers normalise by
            themselves.
    """

    architecture: str
    file: Path | None = None
    mean: ThreeNumbers = (0.0, 0.0, 0.0)
    std: tuple[Deviation, Deviation, Deviation] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        module, colon, function = self.architecture.partition(":")
        if colon and all(part.isidentifier() for part in f"{module}.{function}".split(".")):
            return
        if self.architecture not in ARCHITECTURES:
            known = none_of(self.architecture, ARCHITECTURES)
            module, _, function = self.architecture.rpartition(".")
            hint = f" (did you mean {module}:{function}?)" if module else ""
            known = f"{known}, or a callable module:function that returns a torch.nn.Module{hint}"
            raise RecipeError(f"architecture is {known}")


_BATCH, _SAMPLES = Batch(1, 8, 32), Samples(8, 32)


@dataclass(frozen=True)
class Recipe:
    """The settings of a pipeline.

    Attributes:
        family: family of the purifier.
        image_size: side of the square images, in pixels.
        classes: names in the order of the logits; a YAML file may have their number instead.
        schedule: name of the default schedule among ``alphas``.
        purifier: its weights; None if they are given at export. In a YAML file, the path is relative to that file.
        alphas: named schedules of n alphas each, before ``attenuation``; "linear" and "cosine" are predefined.
        temperature: of the NVAE prior.
        input_noise_l2: L2 norm of the noise added to each input image, 0 for none.
        weights: in what large weights are stored: "fp16" and "bf16" halve the archive (`export.weights`).
        precision: "fp32", "fp16" (graphs in half precision) or "bf16" (fp32 graphs that OpenVINO computes in bf16).
    """

    MOVED: ClassVar[Mapping[str, str]] = {"cpu_batch": "write batch: {min: 1, opt: 4, max: 8, cpu: 1}"}

    name: Name
    family: Literal["e4e", "nvae", "style_transformer"]
    image_size: Annotated[int, Range(8, 4096)]
    n_latents: Annotated[int, Range(1, 1024)]
    classifier: ClassifierRecipe
    classes: Classes
    schedule: str = "linear"
    alphas: Mapping[Name, tuple[Fraction, ...]] = field(default_factory=dict)
    attenuation: Fraction = 1.0
    purifier: Path | None = None
    temperature: Annotated[float, Range(0.0, 10.0, exclusive=True)] = 0.6
    input_noise_l2: Annotated[float, Range(0.0)] = 0.0
    blur: bool = False
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    weights: Stored = "fp32"
    runtime: str = "auto"
    batch: Batch = _BATCH
    samples: Samples = _SAMPLES

    def __post_init__(self) -> None:
        n = self.n_latents
        linear = tuple((i + 1) / n for i in range(n))
        cosine = tuple(0.5 * (1.0 - math.cos(math.pi * a)) for a in linear)
        object.__setattr__(self, "alphas", {"linear": linear, "cosine": cosine, **self.alphas})
        for name, values in self.alphas.items():
            if len(values) != n:
                raise ValueError(
                    f"alphas.{name} has {len(values)} weights, must have one for each latent (n_latents is {n})"
                )
        if self.schedule not in self.alphas:
            raise ValueError(f"schedule is {none_of(self.schedule, self.alphas)}")
        if self.runtime not in runtimes.NAMES:
            raise ValueError(f"runtime is {none_of(self.runtime, runtimes.NAMES)}")
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for i, name in enumerate(self.classes) if name in self.classes[:i])
            raise ValueError(f"classes has {twice!r} twice")

    def effective_alphas(self, schedule: str | None = None) -> list[float]:
        """The n effective alphas, attenuation * alpha_i, of a schedule (by default the default one)."""
        return [self.attenuation * alpha for alpha in self.alphas[schedule or self.schedule]]

    @classmethod
    def read(cls, name_or_path: str | Path, **changes: Any) -> "Recipe":
        """Read a recipe, given by the name of a built-in one or the path of a YAML file.

        Args:
            changes: fields that replace those of the file.

        Raises:
            RecipeError: there is no such recipe, or a field is wrong; the message names the file and the field.
        """
        path = _find(name_or_path)
        try:
            content = read_yaml(path)
            if isinstance(content, dict):
                content |= changes
                if type(count := content.get("classes")) is int and 2 <= count <= 100_000:
                    content["classes"] = [f"class {i}" for i in range(count)]
            recipe = read_strict(cls, content, str(path))
        except FieldError as error:
            raise RecipeError(str(error)) from None
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None
        classifier = dataclasses.replace(recipe.classifier, file=_beside(path, recipe.classifier.file))
        return dataclasses.replace(recipe, purifier=_beside(path, recipe.purifier), classifier=classifier)


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    built_in = {file.stem: file for file in RECIPES.glob("*.yaml")}
    if str(name_or_path) in built_in:
        return built_in[str(name_or_path)]
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        if path.exists():
            return path
        raise RecipeError(f"{path}: no such file")
    raise RecipeError(f"no recipe {none_of(str(name_or_path), built_in)}, or a YAML file")


def _beside(recipe: Path, file: Path | None) -> Path | None:
    return None if file is None else (recipe.parent / file.expanduser()).resolve()
