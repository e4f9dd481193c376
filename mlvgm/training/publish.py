"""What a training run leaves: weights, a recipe that `mlvgm export` takes, a model card, and the curve."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from mlvgm.nvae import NVAE
from mlvgm.training.images import ImageSet
from mlvgm.training.nvae import Report
from mlvgm.training.picture import draw_curve
from mlvgm.training.settings import TrainingSettings

WEIGHTS, RECIPE, CARD, SETTINGS, CURVE = "nvae.safetensors", "recipe.yaml", "README.md", "training.yaml", "curve.png"
TEMPERATURE = 0.6
"""Of the prior's draws in purification, as the paper has it."""


def default_alphas(n: int) -> list[float]:
    """For a model that is not tuned yet: the coarse two thirds are kept, the fine third is half resampled."""
    kept = n - max(1, -(-n // 3))
    return [0.0] * kept + [0.5] * (n - kept)


def write_weights(network: NVAE, file: Path) -> None:
    """Tensors by the names of the published checkpoints, the configuration beside them."""
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(tensors, file, metadata={"configuration": json.dumps(network.config.to_checkpoint())})


def publish(
    network: NVAE,
    reports: Sequence[Report],
    settings: TrainingSettings,
    images: ImageSet,
    out: Path,
    classes: Sequence[str],
    command: str,
) -> None:
    """Write the folder ``out``; the recipe names no classifier yet.

    Args:
        reports: of the training, at least one.
        classes: names of the classifier's classes, as far as known.
        command: what was called, for the model card.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_weights(network, out / WEIGHTS)
    (out / SETTINGS).write_text(yaml.safe_dump(settings.as_mapping(), sort_keys=False))
    draw_curve(reports, out / CURVE)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.resolve().name).strip(".-")[:64] or "model"
    (out / RECIPE).write_text(_recipe(name, network, classes))
    (out / CARD).write_text(_card(name, network, settings, images, command, reports[-1]))


def _recipe(name: str, network: NVAE, classes: Sequence[str]) -> str:
    n = len(network.config.latents())
    given = {"name": name, "image_size": network.config.resolution, "temperature": TEMPERATURE}
    recipe = _filled("recipe.yaml", **given, n=n, alphas=default_alphas(n))
    return recipe + yaml.safe_dump({"classes": list(classes) or 2})


def _card(name: str, network: NVAE, settings: TrainingSettings, images: ImageSet, command: str, last: Report) -> str:
    config, unreadable = network.config, len(images.unreadable)
    latents = ", ".join(f"{count} of {config.side(s)}x{config.side(s)}" for s, count in enumerate(config.groups))
    answers = ""
    if settings.classifier:
        name_and_value = f"of `{settings.classifier}`, last batch | {last['answer_divergence']:.4f} nats an image"
        answers = f"\n| divergence of the answers {name_and_value} |"
    left_out = f"; {unreadable} files could not be read and were left out" if unreadable else ""
    parameters = sum(p.numel() for p in network.parameters())
    given = {"name": name, "command": command, "config": config, "settings": settings, "images": images, "last": last}
    return _filled("card.md", **given, latents=latents, parameters=parameters, left_out=left_out, answers=answers)


def _filled(file: str, **values: Any) -> str:
    """The template of a file, which lies beside this one, with its fields replaced as `str.format` does."""
    template = Path(__file__).with_name(f"{file}.template")
    return template.read_text(encoding="utf-8").format(**values)
