"""Classifiers of the shape of the shipped one: trained on attacked or on noisy images, or plainly from another seed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.changes import L2
from evaluation.comparators.training import Comparator, ComparatorError
from mlvgm.load import load_shipped_classifier
from mlvgm.vgg import VGG11


@dataclass(frozen=True)
class Attack:
    """Projected gradient ascent in the L2 norm from a random start (Madry et al., ICLR 2018).

    Attributes:
        l2: norm of the largest change, for images in [0, 1].
        steps: of gradient ascent, each 2.5 times ``l2`` over their number.
    """

    l2: float = 0.5
    steps: int = 7

    def __call__(self, images: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """Images within the ball around ``images`` (B, 3, H, W); ``objective`` of a batch (a scalar) is maximised."""
        ball = L2(self.l2)
        changed = ball.project(images, images + self.l2 * ball.direction(torch.randn_like(images)))
        for _ in range(self.steps):
            changed.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(changed), changed)
            step = 2.5 * self.l2 / self.steps * ball.direction(gradient)
            changed = ball.project(images, changed.detach() + step)
        return changed.detach()


VALIDATION = Attack(steps=10)


@dataclass(frozen=True)
class Plain(Comparator):
    """Cross-entropy on clean images from fresh weights, by Adam: as the shipped classifier was, from another seed."""

    def begin(self, classes: int) -> nn.Module:
        network: nn.Module = VGG11(classes, width=0.5, pool=1)
        return _channels_last(network)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), lr=self.rate)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(network(_fast(images)), labels)

    def look(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"accuracy": network(_fast(images)).argmax(1) == labels}


@dataclass(frozen=True)
class Smoothed(Plain):
    """The same on noisy images, for certificates (Cohen, Rosenfeld and Kolter, ICML 2019).

    Attributes:
        sigma: standard deviation of the noise, for images in [0, 1].
    """

    sigma: float = 0.25

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return super().loss(network, self._noisy(images), labels)

    def look(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        noisy, clean = (super(Smoothed, self).look(network, seen, labels) for seen in (self._noisy(images), images))
        return {"noisy": noisy["accuracy"], "clean": clean["accuracy"]}

    def _noisy(self, images: Tensor) -> Tensor:
        return (images + self.sigma * torch.randn_like(images)).clamp(0, 1)


@dataclass(frozen=True)
class Adversarial(Comparator):
    """Adversarial training from the shipped weights, as far as they are of as many classes.

    Attributes:
        attack: at each training image.
        decay: of the weights.
    """

    attack: Attack = Attack()
    decay: float = 5e-4

    def begin(self, classes: int) -> nn.Module:
        network = copy.deepcopy(load_shipped_classifier("road-signs"))
        if network(torch.zeros(1, 3, 32, 32)).shape[1] != classes:
            raise ComparatorError(f"the images have {classes} classes, the shipped classifier has others")
        return _channels_last(network)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            network.parameters(), self.rate, momentum=0.9, nesterov=True, weight_decay=self.decay, foreach=True
        )

    def look(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        images = _fast(images)
        attacked = VALIDATION(images, lambda changed: F.cross_entropy(network(changed), labels, reduction="sum"))
        with torch.no_grad():
            right = {"attacked": network(attacked).argmax(1) == labels, "clean": network(images).argmax(1) == labels}
        return {"attacked": right["attacked"] & right["clean"], "clean": right["clean"]}


@dataclass(frozen=True)
class PGD(Adversarial):
    """Cross-entropy on attacked images (Madry et al., ICLR 2018)."""

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        network.eval()  # an attack must not move the statistics of batch norms
        attacked = self.attack(
            _fast(images), lambda changed: F.cross_entropy(network(changed), labels, reduction="sum")
        )
        return F.cross_entropy(network.train()(attacked), labels)


@dataclass(frozen=True)
class Trades(Adversarial):
    """Cross-entropy on clean images, and the distance of answers to attacked ones (Zhang et al., ICML 2019).

    Attributes:
        beta: weight of the distance, a KL divergence.
    """

    beta: float = 6.0

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        images = _fast(images)
        network.eval()
        with torch.no_grad():
            wanted = F.log_softmax(network(images), dim=1)
        attacked = self.attack(images, lambda changed: _divergence(network(changed), wanted, "sum"))
        clean, other = network.train()(torch.cat((images, attacked))).chunk(2)
        return F.cross_entropy(clean, labels) + self.beta * _divergence(other, F.log_softmax(clean, dim=1), "batchmean")


def _divergence(logits: Tensor, wanted: Tensor, reduction: str) -> Tensor:
    return F.kl_div(F.log_softmax(logits, dim=1), wanted, reduction=reduction, log_target=True)


def _channels_last(network: nn.Module) -> nn.Module:
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _fast(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
