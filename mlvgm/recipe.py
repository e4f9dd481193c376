"""A recipe: everything about a pipeline that is not in its weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "export" / "recipes"

PRECISIONS = ("fp32", "fp16", "bf16")


class RecipeError(ValueError):
    """A recipe is missing or says something impossible."""


@dataclass(frozen=True)
class ClassifierRecipe:
    """``architecture`` names a published one (resnet50, resnext50, vgg11), "onnx", or a callable ``module:function``.

    Attributes:
        file: its weights, relative to the project's root; None where the user names them at export.
        mean, std: normalisation in front of an ONNX classifier; the published ones normalise by themselves.
    """

    architecture: str
    file: str | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Recipe:
    """One pipeline.

    Attributes:
        family: "e4e", "style_transformer" or "nvae".
        image_size: side of the square images, in pixels.
        classes: names in the order of the logits; in the file, a number stands for that many neutral names.
        schedule: the one of ``alphas`` that is served by default.
        purifier: its weights, relative to the project's root; None where the user names them at export.
        alphas: named schedules, n weights each, before ``attenuation``; "linear" and "cosine" may be left out.
        temperature: of the NVAE prior.
        input_noise_l2: norm of the noise added to the input, 0 for none.
        precision: "fp32", "fp16" (graphs in half precision) or "bf16" (fp32 graphs that OpenVINO computes in bf16).
        batch: rows per engine call: min, opt, max.
        cpu_batch: the most rows that are worth a call on a CPU; 0 stands for the maximum.
        samples: purified copies that vote on one image: default and max.
    """

    name: str
    family: str
    image_size: int
    n_latents: int
    classifier: ClassifierRecipe
    classes: tuple[str, ...]
    schedule: str = "linear"
    alphas: Mapping[str, Sequence[float]] = field(default_factory=dict)
    attenuation: float = 1.0
    purifier: str | None = None
    temperature: float = 0.6
    input_noise_l2: float = 0.0
    blur: bool = False
    precision: str = "fp32"
    runtime: str = "auto"
    batch: tuple[int, int, int] = (1, 8, 32)
    cpu_batch: int = 0
    samples: tuple[int, int] = (8, 32)

    def effective_alphas(self, schedule: str | None = None) -> list[float]:
        """The n effective weights a_i = attenuation * alpha_i of a schedule (the default one)."""
        return [self.attenuation * alpha for alpha in self.alphas[schedule or self.schedule]]

    @classmethod
    def read(cls, name_or_path: str | Path) -> "Recipe":
        """A recipe by the name of a built-in one, or by the path of a YAML file.

        Raises:
            RecipeError: naming the file and what is wrong in it.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = RECIPES / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
            raise RecipeError(f"no recipe {str(name_or_path)!r}: give a YAML file or one of {known}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls._from(content)
        except (yaml.YAMLError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RecipeError(f"{path}: {error}") from None

    @classmethod
    def _from(cls, content: Any) -> "Recipe":
        unknown = set(content) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown field {min(unknown)!r}")
        classifier = content["classifier"]
        for key in ("mean", "std"):
            if key in classifier:
                classifier[key] = tuple(float(v) for v in classifier[key])
        content["classifier"] = ClassifierRecipe(**classifier)
        names = content["classes"]
        if isinstance(names, int):
            names = [f"class {i}" for i in range(names)]
        content["classes"] = tuple(str(c) for c in names)
        n = int(content["n_latents"])
        linear = [(i + 1) / n for i in range(n)]
        cosine = [0.5 * (1.0 - math.cos(math.pi * a)) for a in linear]
        content["alphas"] = {"linear": linear, "cosine": cosine, **content.get("alphas", {})}
        for key in ("batch", "samples"):
            if key in content:
                content[key] = tuple(int(v) for v in content[key])
        recipe = cls(**content)
        recipe._check()
        return recipe

    def _check(self) -> None:
        for name, values in self.alphas.items():
            if len(values) != self.n_latents:
                raise ValueError(f"alphas.{name} has {len(values)} weights for {self.n_latents} latents")
            if not all(0.0 <= a * self.attenuation <= 1.0 for a in values):
                raise ValueError(f"alphas.{name}: effective weights must lie in [0, 1]")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.schedule not in self.alphas:
            raise ValueError(f"schedule {self.schedule!r} is none of {', '.join(sorted(self.alphas))}")
        if not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise ValueError("batch must be three rising numbers: min, opt, max")
        if self.cpu_batch and not self.batch[0] <= self.cpu_batch <= self.batch[2]:
            raise ValueError("cpu_batch must lie between the smallest and the largest batch")
        if not 1 <= self.samples[0] <= self.samples[1]:
            raise ValueError("samples must be two rising numbers: default, max")
        if len(self.classes) < 2:
            raise ValueError("classes must name at least two classes")
