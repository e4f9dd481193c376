"""Small checkpoints in the published formats, with weights that depend on nothing but the key."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlvgm.e4e import Encoder4Editing
from mlvgm.irse import Widths
from mlvgm.nvae import NVAE, NVAEConfig
from mlvgm.purifier import Purified
from mlvgm.resnet import ResNetClassifier
from mlvgm.style_transformer import StyleTransformerEncoder
from mlvgm.stylegan2 import Generator, StyleGan2Purifier
from mlvgm.vgg import VGG11

STYLE_DIM = 16
WIDTHS = Widths(8, 8, 16, 16, 16)
Checkpoint = dict[str, Any]


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard-normal float32 tensor that only ``name`` decides."""
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    return torch.from_numpy(np.asarray(generator.standard_normal(size=shape, dtype=np.float32)))


def images(name: str, batch: int, side: int) -> Tensor:
    """Smooth random images in [0, 1], (B, 3, side, side)."""
    coarse = nn.functional.interpolate(draw(name, (batch, 3, 8, 8)), size=(side, side), mode="bicubic")
    return (0.5 + 0.2 * coarse + 0.05 * draw(f"{name}.grain", (batch, 3, side, side))).clamp(0, 1)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """State dict of ``module`` with redrawn values of a sane scale."""
    return {key: _value(key, tensor) for key, tensor in module.state_dict().items()}


def _value(key: str, old: Tensor) -> Tensor:
    leaf, z = key.rpartition(".")[2], draw(key, tuple(old.shape)) if old.is_floating_point() else old
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


def e4e(size: int = 32, **opts: Any) -> Checkpoint:
    """An e4e checkpoint with a ``size`` x ``size`` generator."""
    generator = Generator(_channels(size), STYLE_DIM)
    encoder = Encoder4Editing(WIDTHS, generator.n_latents, STYLE_DIM)
    return {
        "state_dict": weights(nn.ModuleDict({"encoder": encoder, "decoder": generator})),
        "latent_avg": 0.3 * draw("latent_avg", (generator.n_latents, STYLE_DIM)),
        "opts": {"encoder_type": "Encoder4Editing", "stylegan_size": size, "start_from_latent_avg": True, **opts},
    }


def style_transformer(size: int = 32, **opts: Any) -> Checkpoint:
    """A Style Transformer checkpoint with a ``size`` x ``size`` generator."""
    generator = Generator(_channels(size), STYLE_DIM)
    encoder = StyleTransformerEncoder(WIDTHS, generator.n_latents, hidden=24)
    wrapped = {"encoder": nn.ModuleDict({"module": encoder}), "decoder": nn.ModuleDict({"module": generator})}
    return {
        "state_dict": weights(nn.ModuleDict(wrapped)),
        "latent_avg": 0.3 * draw("latent_avg", (generator.n_latents, STYLE_DIM)),
        "opts": {"output_size": size, "learn_in_w": False, "start_from_latent_avg": True, **opts},
    }


def resnet(groups: int = 1, n_classes: int = 3) -> Checkpoint:
    """A classifier checkpoint: ResNet, or ResNeXt with 32 groups."""
    return {"epoch": 1, "global_step": 1, "state_dict": weights(ResNetClassifier(n_classes, stem=16, groups=groups))}


def save(checkpoint: Any, folder: Path) -> Path:
    """Write a checkpoint as the published files are written."""
    path = folder / "small.pt"
    torch.save(checkpoint, path)
    return path


def _channels(size: int) -> list[int]:
    return [16, 16, 12, 8, 8, 4, 4, 4, 4][: size.bit_length() - 2]


def purify(purifier: StyleGan2Purifier, blur: bool = False) -> Purified:
    """Two images, with every input a function of its name."""
    side, n = purifier.image_size, purifier.n_latents
    noise = [draw(f"purify.noise.{i}", (2, *shape)) for i, shape in enumerate(purifier.noise_shapes)]
    alphas = [i / n for i in range(n)]
    return purifier.purify(
        images("purify", 2, side), noise, alphas, blur, draw("purify.input", (2, 3, side, side)), input_noise_l2=2.0
    )


def summary(purified: Purified) -> dict[str, Tensor]:
    """What the recorded outputs hold: both codes, and the image at reduced size with a crop of its pixels."""
    return {
        "codes": torch.stack(purified.codes, dim=1),
        "mixed": torch.stack(purified.mixed, dim=1),
        "reduced": nn.functional.avg_pool2d(purified.images, 8),
        "crop": purified.images[:, :, 60:68, 60:68],
    }


def vgg() -> Checkpoint:
    """VGG-11 with an eighth of the channels and 3 classes."""
    return {"epoch": 1, "global_step": 1, "state_dict": weights(VGG11(3, width=0.125, pool=2))}


def nvae() -> Checkpoint:
    """NVAE at 16 px with three latents."""
    config = NVAEConfig(
        resolution=16,
        groups=(1, 2),
        cells_per_group=1,
        latent_channels=2,
        flow_cells=0,
        channels=4,
        blocks=1,
        cells_per_block=1,
        mixtures=2,
    )
    return {"configuration": config.to_checkpoint(), "state_dict_temp=0.6": NVAE(config).state_dict()}
