"""What a training run leaves: weights, a recipe that `mlvgm export` takes, a model card, and the curve."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from safetensors.torch import save_file

from mlvgm.nvae import NVAE
from mlvgm.training.images import ImageSet
from mlvgm.training.nvae import LOG
from mlvgm.training.picture import draw_curve
from mlvgm.training.settings import Settings

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
    network: NVAE, settings: Settings, images: ImageSet, work: Path, out: Path, classes: Sequence[str], command: str
) -> None:
    """Write the folder ``out``; the recipe names no classifier yet.

    Args:
        classes: names of the classifier's classes, as far as known.
        command: what was called, for the model card.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_weights(network, out / WEIGHTS)
    (out / SETTINGS).write_text(yaml.safe_dump(settings.as_mapping(), sort_keys=False))
    draw_curve(work / LOG, out / CURVE)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.resolve().name).strip(".-")[:64] or "model"
    (out / RECIPE).write_text(_recipe(name, network, classes))
    last = json.loads((work / LOG).read_text().splitlines()[-1])
    (out / CARD).write_text(_card(name, network, settings, images, command, last))


def _recipe(name: str, network: NVAE, classes: Sequence[str]) -> str:
    n = len(network.config.latents())
    content = {
        "name": name,
        "family": "nvae",
        "image_size": network.config.resolution,
        "n_latents": n,
        "purifier": WEIGHTS,
        "temperature": TEMPERATURE,
        "classifier": {"architecture": "onnx"},
        "schedule": "fine",
        "alphas": {"fine": default_alphas(n)},
        "samples": {"default": "auto", "max": 32},
        "batch": {"min": 1, "opt": 16, "max": 32},
        "classes": list(classes) if classes else 2,
    }
    head = (
        "# Export with: mlvgm export --recipe recipe.yaml --classifier FILE.onnx\n"
        "# classifier: takes RGB images in [0, 1]; give its mean and std here if it wants them normalised, or name a\n"
        "# published architecture or a callable module:function instead of onnx.\n"
        "# classes: names in the order of the logits, or their number.\n"
        "# alphas: a default; `mlvgm tune` finds better ones.\n"
    )
    return head + yaml.safe_dump(content, sort_keys=False)


def _card(name: str, network: NVAE, settings: Settings, images: ImageSet, command: str, last: dict[str, object]) -> str:
    config, unreadable = network.config, len(images.unreadable)
    latents = ", ".join(f"{count} of {config.side(s)}x{config.side(s)}" for s, count in enumerate(config.groups))
    answers = ""
    if settings.classifier:
        name_and_value = f"of `{settings.classifier}`, last batch | {last['answer_divergence']:.4f} nats an image"
        answers = f"\n| divergence of the answers {name_and_value} |"
    left_out = f"; {unreadable} files could not be read and were left out" if unreadable else ""
    return f"""# Model card: {name}

An NVAE that purifies RGB images of {config.resolution}x{config.resolution} pixels in front of a classifier.

| | |
| --- | --- |
| latents, coarse to fine | {latents}; {config.latent_channels} channels each |
| parameters | {sum(p.numel() for p in network.parameters()):,} |
| images | {len(images.train):,} for training and {len(images.validation):,} held out, from {images.source}{left_out} |
| digest of the images | {images.digest[:16]} |
| steps | {settings.steps:,} of {settings.batch} images; {last["skipped"]} skipped for gradients that were not finite |
| log likelihood, last batch | {last["log_likelihood"]:.4f} nats per value |{answers}
| squared error of held-out reconstructions | {last["validation_mse"]:.5f} |

![curve]({CURVE})

Made by

    {command}

with the settings in [{SETTINGS}]({SETTINGS}). The training objective is the evidence lower bound under randomly
interpolated latents, so that the coarse latents hold what an image shows and the fine ones may be resampled: in the
picture, from top to bottom, ever more of them are.

![latents](latents.png)

How well this defends depends on the classifier behind it: measure it there with `mlvgm attack`, and choose the weights
of the interpolation with `mlvgm tune`.
"""
