"""Small A-VAE and ND-VAE, the autoencoders that the paper compares with, trained as the shipped purifier is.

Both learn to give the clean image for an attacked one (FGSM on the shipped classifier, as ND-VAE was published) behind
Gaussian noise. The loss is the evidence lower bound, with the purifier's weights of the divergence and of the
classifier's answers. A-VAE was published with a critic, which makes pictures sharper; here it has none.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.changes import L2
from evaluation.comparators.training import Comparator
from mlvgm.avae import AVAE, AdaIN
from mlvgm.checkpoint import find_weights, read_checkpoint
from mlvgm.load import load_purifier, load_shipped_classifier
from mlvgm.mixture import mixture_log_likelihood
from mlvgm.ndvae import NDVAE, STEM, NDVAEConfig
from mlvgm.purifier import Autoencoder
from mlvgm.training.bound import answer_divergence

SIDE = 32
NOISE = 0.1
"""Standard deviation of ND-VAE's input noise at this size, and the most that A-VAE is trained with."""

NDVAE_CONFIG = NDVAEConfig(channels=8, scales=1, groups=4, cells=2)


@dataclass(frozen=True)
class Gaussian:
    """An approximate posterior: mean and standard deviation, (B, C, h, w) each."""

    mean: Tensor
    sigma: Tensor

    def divergence(self) -> Tensor:
        """(B,): from the standard normal distribution, in nats."""
        variance = self.sigma**2
        return (0.5 * (variance + self.mean**2 - 1.0 - torch.log(variance))).flatten(1).sum(dim=1)


@dataclass(frozen=True)
class Small(Comparator):
    """An autoencoder of either family.

    Attributes:
        l2: norm of the largest change by FGSM, for images in [0, 1].
        beta: weight of the divergence.
        stability: weight of the divergence of the classifier's answers.
    """

    rate: float = 0.002
    l2: float = 1.0
    beta: float = 0.15
    stability: float = 0.3

    @cached_property
    def classifier(self) -> nn.Module:
        """The shipped one."""
        return copy.deepcopy(load_shipped_classifier("road-signs"))

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        seen = self.attacked(images, labels, self.l2 * torch.rand(len(images), 1, 1, 1, device=images.device))
        log_likelihood, posteriors, reconstruction = self.bound(network, images, seen)
        divergence = torch.stack([posterior.divergence() for posterior in posteriors]).sum(dim=0)
        answers = answer_divergence(self.classifier.to(images.device), images, reconstruction)
        return (self.beta * divergence - log_likelihood).mean() / images[0].numel() + self.stability * answers.mean()

    def bound(self, network: Any, images: Tensor, seen: Tensor) -> tuple[Tensor, list[Gaussian], Tensor]:
        """Log likelihood (B,) of ``images`` in nats, the posteriors, and the reconstruction of ``seen``."""
        raise NotImplementedError

    def look(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        assert isinstance(network, Autoencoder)
        attacked = self.attacked(images, labels, torch.full((len(images), 1, 1, 1), self.l2 / 2, device=images.device))
        found = {}
        with torch.no_grad():
            for name, given in (("clean", images), ("attacked", attacked)):
                purified = network.purify(given, draw(network, len(given), given.device)).images
                found[name] = self.classifier(purified).argmax(1) == labels
        return {"mean": (found["clean"].float() + found["attacked"]) / 2, **found}

    def attacked(self, images: Tensor, labels: Tensor, length: Tensor) -> Tensor:
        """FGSM of the norm ``length`` (B, 1, 1, 1) on the classifier, with the normalised gradient."""
        images = images.detach().requires_grad_()
        classifier = self.classifier.to(images.device)
        (gradient,) = torch.autograd.grad(F.cross_entropy(classifier(images), labels, reduction="sum"), images)
        return (images.detach() + length * L2(1.0).direction(gradient)).clamp(0, 1)


@dataclass(frozen=True)
class SmallAVAE(Small):
    """A-VAE; Laplace likelihood with the scale 0.1.

    Attributes:
        channels: 512 as published.
    """

    channels: int = 64

    def begin(self, classes: int) -> nn.Module:
        network = AVAE(SIDE, self.channels)
        for module in network.modules():
            if isinstance(module, AdaIN):  # scales start around 1, shifts around 0
                bias: Any = module.style.linear.bias  # type: ignore[union-attr]
                bias.data[: len(bias) // 2] = 1.0
        return network

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), self.rate, betas=(0.9, 0.99), foreach=True)

    def bound(self, network: Any, images: Tensor, seen: Tensor) -> tuple[Tensor, list[Gaussian], Tensor]:
        sigma = NOISE * torch.rand(len(seen), 1, 1, 1, device=seen.device)
        noisy = (seen + sigma * torch.randn_like(seen)).clamp(0, 1)
        with outputs(network.encoder["conv4"]) as encoded:
            reconstruction = network.purify(noisy, draw(network, len(seen), seen.device)).images
        mean, log_variance = encoded[0].chunk(2, dim=1)
        log_likelihood = -(reconstruction - images).abs().flatten(1).sum(dim=1) / 0.1
        return log_likelihood, [Gaussian(mean, torch.exp(0.5 * log_variance))], reconstruction


@dataclass(frozen=True)
class SmallNDVAE(Small):
    """ND-VAE; its input noise is a part of it."""

    config: NDVAEConfig = NDVAE_CONFIG

    def begin(self, classes: int) -> nn.Module:
        return NDVAE(self.config, start(self.config), NOISE)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adamax(network.parameters(), self.rate, foreach=True)

    def bound(self, network: Any, images: Tensor, seen: Tensor) -> tuple[Tensor, list[Gaussian], Tensor]:
        with outputs(*network.decoder["samplers"], network.image_conditional) as found:
            reconstruction = network.purify(seen, draw(network, len(seen), seen.device)).images
        *posteriors, logits = found
        log_likelihood = mixture_log_likelihood(logits, 2.0 * images - 1.0)
        return log_likelihood, [Gaussian(*posterior) for posterior in posteriors], reconstruction


def draw(network: Autoencoder, batch: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Fresh noise for a batch."""
    return [torch.randn(batch, *shape, device=device) for shape in network.noise_shapes]


def start(config: NDVAEConfig) -> Tensor:
    """The constant that the decoder of an ND-VAE starts from, which its files lack: always the same draw."""
    shape = (1, config.channels * config.factor, SIDE // config.factor, SIDE // config.factor)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def read(family: str, file: Path) -> Autoencoder:
    """The autoencoder that was trained here, ready for inference.

    Raises:
        CheckpointError: the file cannot be used.
    """
    if family == "avae":
        return load_purifier("avae", file, image_size=SIDE)
    tensors = find_weights(read_checkpoint(file), STEM, file)
    return load_purifier("ndvae", file, h=start(NDVAEConfig.from_tensors(tensors, file)))


@contextmanager
def outputs(*modules: nn.Module) -> Iterator[list[Any]]:
    """What ``modules`` return within the context, in the order of their calls."""
    seen: list[Any] = []
    hooks = [module.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
