"""Small checkpoints in the published formats, with weights that depend on nothing but the key."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import synthetic
from benchmarks.synthetic import Checkpoint, draw, weights
from mlvgm.avae import AVAE
from mlvgm.irse import Widths
from mlvgm.ndvae import NDVAE, NDVAEConfig
from mlvgm.nvae import NVAEConfig
from mlvgm.purifier import Autoencoder, Purified
from mlvgm.resnet import ResNetClassifier
from mlvgm.stylegan2 import StyleGan2Purifier
from mlvgm.vgg import VGG11

STYLE_DIM = 16
WIDTHS = Widths(8, 8, 16, 16, 16)
CONFIG = NVAEConfig(
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
AVAE_SIZE = 64
NDVAE_CONFIG = NDVAEConfig(channels=4, scales=2, groups=1, cells=2)


def images(name: str, batch: int, side: int) -> Tensor:
    """Smooth random images in [0, 1], (B, 3, side, side)."""
    coarse = nn.functional.interpolate(draw(name, (batch, 3, 8, 8)), size=(side, side), mode="bicubic")
    return (0.5 + 0.2 * coarse + 0.05 * draw(f"{name}.grain", (batch, 3, side, side))).clamp(0, 1)


def e4e(size: int = 32, **opts: Any) -> Checkpoint:
    """An e4e checkpoint with a ``size`` x ``size`` generator."""
    checkpoint = synthetic.e4e(_channels(size), STYLE_DIM, WIDTHS)
    checkpoint["opts"] |= opts
    return checkpoint


def style_transformer(size: int = 32, **opts: Any) -> Checkpoint:
    """A Style Transformer checkpoint with a ``size`` x ``size`` generator."""
    checkpoint = synthetic.style_transformer(_channels(size), STYLE_DIM, WIDTHS, hidden=24)
    checkpoint["opts"] |= opts
    return checkpoint


def resnet(groups: int = 1, n_classes: int = 3) -> Checkpoint:
    """A classifier checkpoint: ResNet, or ResNeXt with 32 groups."""
    return {"epoch": 1, "global_step": 1, "state_dict": weights(ResNetClassifier(n_classes, stem=16, groups=groups))}


def save(checkpoint: Any, folder: Path) -> Path:
    """Write a checkpoint as the published files are written."""
    path = folder / "small.pt"
    torch.save(checkpoint, path)
    return path


def _channels(size: int) -> tuple[int, ...]:
    return (16, 16, 12, 8, 8, 4, 4, 4, 4)[: size.bit_length() - 2]


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
    return synthetic.nvae(CONFIG)


def avae() -> Checkpoint:
    """A-VAE for 64 pixels with 16 channels in the place of 512."""
    model = AVAE(AVAE_SIZE, channels=16)
    drawn = weights(model)
    # Weights with an equalised learning rate have unit variance; the filters are what every file holds.
    drawn |= {key: draw(key, value.shape) for key, value in drawn.items() if "weight_orig" in key}
    drawn |= {key: 0.1 * draw(key, value.shape) for key, value in drawn.items() if key.endswith("bias")}
    drawn |= {key: value for key, value in model.state_dict().items() if key.endswith(("1.weight", "2.weight", "flip"))}
    return drawn


def ndvae() -> Checkpoint:
    """ND-VAE for 32 pixels with 4 channels."""
    model = NDVAE(NDVAE_CONFIG, ndvae_h(), noise_std=0.1)
    model.load_state_dict(weights(model))  # tensors with two names get one value
    tensors = dict(model.state_dict())
    tensors["image_conditional.1.weight"] = 0.03 * tensors["image_conditional.1.weight"]  # colours within the range
    return tensors


def ndvae_h() -> Tensor:
    return draw("h", (1, 32, 4, 4)).abs()


def reconstruct(purifier: Autoencoder) -> Purified:
    """Two images, with every input a function of its name."""
    noise = [draw(f"purify.noise.{i}", (2, *shape)) for i, shape in enumerate(purifier.noise_shapes)]
    return purifier.purify(images("purify", 2, purifier.image_size), noise)
