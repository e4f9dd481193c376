"""What an NVAE that purifies is trained for: the evidence lower bound under interpolated latents.

The bound holds for any approximate posterior. This one is what purification does with a latent: draws from the
encoder's and from the prior's Gaussian, mixed with a weight. With weights of 0 it is the bound of NVAE (Vahdat and
Kautz, NeurIPS 2020, section 3.2). A latent with weight 1 is drawn from its prior and costs nothing, so what the image
needs has to be in the latents before it. Random schedules of weights teach the coarse latents to hold the content, the
priors of the fine latents to fill in the rest, and the decoder to work with interpolated latents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlvgm.mixture import mixture_log_likelihood, mixture_mean
from mlvgm.nvae import NVAE
from mlvgm.nvae_cells import soft_clamp

FULL_HEIGHT = 0.4
"""Share of the random schedules that rise to a weight of 1; the others stop between 0.3 and 1."""
MIN_HEIGHT = 0.3


@dataclass(frozen=True)
class Bound:
    """The bound of a batch, in nats.

    Attributes:
        log_likelihood: (B,), of the images given the latents.
        divergence: for each latent (B,), of the interpolated posterior from the prior.
        reconstruction: (B, 3, H, W) in [0, 1], the mean image.
    """

    log_likelihood: Tensor
    divergence: list[Tensor]
    reconstruction: Tensor


def evidence_lower_bound(
    network: NVAE, images: Tensor, seen: Tensor | None = None, alphas: Tensor | None = None
) -> Bound:
    """One training pass: every latent is drawn from its interpolated posterior.

    Args:
        network: the model, in training mode.
        images: (B, 3, H, W) in [0, 1].
        seen: what the encoder is given in place of ``images``; where it is noisy, the model learns to leave the noise
            out (Im et al., Denoising Criterion for Variational Auto-Encoding Framework, AAAI 2017).
        alphas: (B, n) in [0, 1], the weight of the prior in each latent; None for 0 everywhere.
    """
    features = network.encode(images if seen is None else seen)
    x = network.start(len(images))
    divergence = []
    for i, (s, g) in enumerate(network.config.latents()):
        x = network.to_latent(s, g, x)
        # Sums and exponentials in fp32, also under autocast.
        parameters = network.prior_and_posterior(s, g, x, features[i])
        mu, log_sigma, delta, delta_log_sigma = (parameter.float() for parameter in parameters)
        prior_mean, prior_log_sigma = soft_clamp(mu), soft_clamp(log_sigma)
        mean, posterior_log_sigma = soft_clamp(mu + delta), soft_clamp(log_sigma + delta_log_sigma)
        a = torch.zeros(()) if alphas is None else alphas[:, i].view(-1, 1, 1, 1)
        mean = (1.0 - a) * mean + a * prior_mean
        # The sum of two independent Gaussians; in units of the prior's standard deviation.
        variance = ((1.0 - a) * torch.exp(posterior_log_sigma - prior_log_sigma)) ** 2 + a**2
        distance = ((mean - prior_mean) * torch.exp(-prior_log_sigma)) ** 2
        divergence.append((0.5 * (variance + distance - 1.0 - torch.log(variance))).flatten(1).sum(dim=1))
        z = mean + torch.exp(prior_log_sigma) * variance.sqrt() * torch.randn_like(mean)
        x = network.from_latent(s, g, x, z)
    logits = network.finish(x).float()
    reconstruction = (mixture_mean(logits) + 1.0) / 2.0
    return Bound(mixture_log_likelihood(logits, 2.0 * images - 1.0), divergence, reconstruction)


def answer_divergence(classifier: nn.Module, images: Tensor, purified: Tensor) -> Tensor:
    """How far the classifier's answers for ``purified`` are from those for ``images``: KL of the softmax, (B,), nats.

    The stability objective of Denoised Smoothing (Salman et al., NeurIPS 2020, section 3): the classifier is not
    changed, and no labels are needed.
    """
    with torch.no_grad():
        wanted = torch.log_softmax(classifier(images), dim=1)
    given = torch.log_softmax(classifier(purified), dim=1)
    return F.kl_div(given, wanted, reduction="none", log_target=True).sum(dim=1)


def random_schedules(batch: int, n: int, whole: float, device: torch.device | str = "cpu") -> Tensor:
    """Weights (batch, n): 0 up to a random latent, from there a rise over a random length to a random height.

    A length of 1 cuts between two latents; starting at the first with the length n and the height 1 is the paper's
    linear schedule.

    Args:
        whole: share of the rows that are 0 everywhere.
    """
    start = torch.randint(0, n, (batch, 1), device=device)
    length = torch.randint(1, n + 1, (batch, 1), device=device)
    height = MIN_HEIGHT + (1.0 - MIN_HEIGHT) * torch.rand(batch, 1, device=device)
    height = torch.where(torch.rand(batch, 1, device=device) < FULL_HEIGHT, 1.0, height)
    rise = (torch.arange(1, n + 1, device=device) - start) / length
    kept = torch.rand(batch, 1, device=device) >= whole
    return height * rise.clamp(0.0, 1.0) * kept
