"""Models small enough to export in seconds, with batch-norm statistics that make every fold matter."""

import torch
from torch import nn

from mlvgm.nvae import NVAE, NVAEConfig, NVAEPurifier
from mlvgm.recipe import Batch, ClassifierRecipe, Recipe, Samples
from mlvgm.vgg import VGG11

CONFIG = NVAEConfig(
    resolution=32,
    groups=(1, 2),
    cells_per_group=1,
    latent_channels=2,
    flow_cells=1,
    channels=4,
    blocks=1,
    cells_per_block=1,
    mixtures=2,
    expansion=2,
    kernel=3,
)


def unsettle(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in eval mode, with drawn batch-norm statistics and affine maps."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(0.1 * torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(0.6 + 0.8 * torch.rand(norm.num_features, generator=generator))
            norm.weight.data.copy_(0.8 + 0.4 * torch.rand(norm.num_features, generator=generator))
            norm.bias.data.copy_(0.1 * torch.randn(norm.num_features, generator=generator))
    return model.eval().requires_grad_(False)


def purifier() -> NVAEPurifier:
    torch.manual_seed(0)
    network = NVAE(CONFIG)
    for name, mask in network.named_buffers():
        if name.endswith("mask"):
            mask.fill_(1.0)
    made = NVAEPurifier(network)
    unsettle(made)
    return made


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return unsettle(VGG11(n_classes=3, width=0.125, pool=1), seed=1)


def recipe(blur: bool = False, input_noise_l2: float = 0.0) -> Recipe:
    return Recipe(
        name="tiny",
        family="nvae",
        image_size=32,
        n_latents=3,
        classifier=ClassifierRecipe("vgg11"),
        classes=("a", "b", "c"),
        alphas={"linear": (0.25, 0.5, 1.0)},
        attenuation=0.7,
        blur=blur,
        input_noise_l2=input_noise_l2,
        batch=Batch(1, 2, 4),
        samples=Samples(2, 8),
    )
