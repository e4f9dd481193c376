"""Random weights in the published checkpoint formats, at the published sizes: for speed, where nobody has the weights.

Scales are such that activations stay sane through every layer; a tensor depends on nothing but its key.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlvgm.e4e import Encoder4Editing
from mlvgm.irse import Widths
from mlvgm.nvae import NVAE, NVAEConfig
from mlvgm.recipe import Recipe, RecipeError
from mlvgm.resnet import ResNetClassifier
from mlvgm.style_transformer import StyleTransformerEncoder
from mlvgm.stylegan2 import PUBLISHED_CHANNELS, Generator
from mlvgm.vgg import VGG11

Checkpoint = dict[str, Any]

PUBLISHED = Widths()
"""Of the encoders."""

CELEBA_64 = NVAEConfig(
    resolution=64,
    groups=(8, 8, 8),
    cells_per_group=2,
    latent_channels=16,
    flow_cells=0,
    channels=128,
    blocks=1,
    cells_per_block=2,
    mixtures=10,
)


def write_checkpoints(recipe: Recipe, folder: Path) -> tuple[Path, Path]:
    """A purifier and a classifier that fit ``recipe``, as the files ``purifier.pt`` and ``classifier.pt``.

    Raises:
        ValueError: the recipe is of no published pipeline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "purifier.pt", folder / "classifier.pt"
    torch.save(_purifier(recipe), files[0])
    torch.save(_classifier(recipe), files[1])
    return files


def e4e(channels: tuple[int, ...], style_dim: int = 512, widths: Widths = PUBLISHED) -> Checkpoint:
    """An e4e checkpoint with a generator of these widths."""
    generator = Generator(channels, style_dim)
    encoder = Encoder4Editing(widths, generator.n_latents, style_dim)
    return {
        "state_dict": weights(nn.ModuleDict({"encoder": encoder, "decoder": generator})),
        "latent_avg": 0.3 * draw("latent_avg", (generator.n_latents, style_dim)),
        "opts": {"encoder_type": "Encoder4Editing", "stylegan_size": generator.size, "start_from_latent_avg": True},
    }


def style_transformer(
    channels: tuple[int, ...], style_dim: int = 512, widths: Widths = PUBLISHED, hidden: int = 1024
) -> Checkpoint:
    """A Style Transformer checkpoint with a generator of these widths."""
    generator = Generator(channels, style_dim)
    encoder = StyleTransformerEncoder(widths, generator.n_latents, hidden)
    wrapped = {"encoder": nn.ModuleDict({"module": encoder}), "decoder": nn.ModuleDict({"module": generator})}
    return {
        "state_dict": weights(nn.ModuleDict(wrapped)),
        "latent_avg": 0.3 * draw("latent_avg", (generator.n_latents, style_dim)),
        "opts": {"output_size": generator.size, "learn_in_w": False, "start_from_latent_avg": True},
    }


def nvae(config: NVAEConfig, temperature: float = 0.6) -> Checkpoint:
    """An NVAE checkpoint of this shape, as PyTorch initialises it."""
    torch.manual_seed(0)
    return {"configuration": config.to_checkpoint(), f"state_dict_temp={temperature}": NVAE(config).state_dict()}


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard-normal float32 tensor that only ``name`` decides."""
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    return torch.from_numpy(np.asarray(generator.standard_normal(size=shape, dtype=np.float32)))


def weights(module: nn.Module, drawn: Callable[[str, tuple[int, ...]], Tensor] | None = None) -> dict[str, Tensor]:
    """State dict of ``module`` with values of a sane scale, redrawn by ``drawn`` (by default, `draw`)."""
    return {key: _value(key, tensor, drawn or draw) for key, tensor in module.state_dict().items()}


def _purifier(recipe: Recipe) -> Checkpoint:
    if recipe.family == "nvae" and recipe.n_latents == len(CELEBA_64.latents()):
        return nvae(CELEBA_64, recipe.temperature)
    if recipe.family == "e4e":
        return e4e(PUBLISHED_CHANNELS[: recipe.n_latents // 2])
    if recipe.family == "style_transformer":
        return style_transformer(PUBLISHED_CHANNELS[: recipe.n_latents // 2])
    raise RecipeError(f"recipe {recipe.name}: no published size is known for it; give --purifier and --classifier")


def _classifier(recipe: Recipe) -> Checkpoint:
    n = len(recipe.classes)
    torch.manual_seed(0)
    if recipe.classifier.architecture == "vgg11":
        return {"state_dict": VGG11(n).state_dict()}
    if recipe.classifier.architecture in ("resnet50", "resnext50"):
        groups = 32 if recipe.classifier.architecture == "resnext50" else 1
        return {"state_dict": weights(ResNetClassifier(n, groups=groups))}
    raise RecipeError(f"recipe {recipe.name}: its classifier has no published format; give --classifier")


def _value(key: str, old: Tensor, drawn: Callable[[str, tuple[int, ...]], Tensor]) -> Tensor:
    leaf, z = key.rpartition(".")[2], drawn(key, tuple(old.shape)) if old.is_floating_point() else old
    if leaf in ("kernel", "num_batches_tracked"):
        return old
    if leaf == "running_var":
        return 0.8 + 0.2 * z.abs()
    if "modulation.bias" in key:
        return 1 + 0.1 * z
    if leaf in ("running_mean", "bias", "in_proj_bias"):
        return z * (10 if ".style." in f".{key}" else 0.1)
    if key.endswith("noise.weight"):
        return 0.1 + 0.05 * z.abs()
    if ".style." in f".{key}":
        return 100 * z  # the mapping network's learning-rate multiplier is 0.01
    if leaf == "weight" and old.ndim == 1:
        return 0.6 + 0.1 * z
    equalised = ("noises." in key, "input.input" in key, "modulation" in key, ".linear.weight" in key, old.ndim == 5)
    return z if any(equalised) else z / max(1.0, float(np.sqrt(old[0].numel())))
