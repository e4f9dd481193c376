"""Training of NVAE by the evidence lower bound (NVAE, section 3; its appendix for the schedules)."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mlvgm.mixture import mixture_log_likelihood, mixture_mean
from mlvgm.nvae import NVAE
from mlvgm.nvae_cells import soft_clamp
from mlvgm.training.data import Signs, augment
from mlvgm.training.loop import Progress, batches, cosine_rate

NOISE = 0.05
"""Standard deviation, at most, of the noise that the encoder sees in training."""


@dataclass(frozen=True)
class Bound:
    """The evidence lower bound of a batch in nats, (B,) and one (B,) per latent, and the mean image."""

    log_likelihood: Tensor
    divergence: list[Tensor]
    reconstruction: Tensor


def evidence_lower_bound(network: NVAE, images: Tensor, seen: Tensor | None = None) -> Bound:
    """One training forward pass: every latent is drawn from its posterior, relative to its prior (section 3.2).

    Args:
        network: the model, in training mode.
        images: (B, 3, H, W) in [0, 1].
        seen: what the encoder is given in place of ``images``; where it is noisy, the model learns to leave the noise
            out (Im et al., Denoising Criterion for Variational Auto-Encoding Framework, AAAI 2017).
    """
    features = network.encode(images if seen is None else seen)
    x = network.start(len(images))
    divergence = []
    for i, (s, g) in enumerate(network.config.latents()):
        x = network.to_latent(s, g, x)
        mu, log_sigma, delta, delta_log_sigma = network.prior_and_posterior(s, g, x, features[i])
        prior_mean, prior_log_sigma = soft_clamp(mu), soft_clamp(log_sigma)
        mean, posterior_log_sigma = soft_clamp(mu + delta), soft_clamp(log_sigma + delta_log_sigma)
        z = mean + torch.exp(posterior_log_sigma) * torch.randn_like(mean)
        ratio = 2.0 * (posterior_log_sigma - prior_log_sigma)
        distance = ((mean - prior_mean) * torch.exp(-prior_log_sigma)) ** 2
        divergence.append((0.5 * (torch.exp(ratio) + distance - 1.0 - ratio)).flatten(1).sum(dim=1))
        x = network.from_latent(s, g, x, z)
    logits = network.finish(x)
    scaled = 2.0 * images - 1.0
    with torch.no_grad():
        reconstruction = (mixture_mean(logits) + 1.0) / 2.0
    return Bound(mixture_log_likelihood(logits, scaled), divergence, reconstruction)


def train_nvae(
    train: Signs, validation: Signs, network: NVAE, steps: int, checkpoint: Path, beta: float = 1.0, batch: int = 32
) -> NVAE:
    """Fit ``network`` with Adamax; resumes from ``checkpoint`` where it exists.

    Args:
        beta: weight of the divergence once warmed up; below 1 reconstructions are sharper.

    Returns:
        The exponential moving average of the weights, batch-norm statistics re-estimated.
    """
    peak, warmup = 3e-3, 100
    optimizer = torch.optim.Adamax(network.parameters(), lr=peak)
    average = copy.deepcopy(network).requires_grad_(False)
    images, _ = train.tensors()
    held_out = validation.tensors()[0][:256]
    step = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    progress = Progress("nvae", steps)
    while step < steps:
        for index in batches(len(train), batch, seed=step):
            if step == steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = peak * cosine_rate(step, steps, warmup)
            network.train()
            clean = augment(images[index], strength=0.6)
            sigma = NOISE * torch.rand(len(clean), 1, 1, 1)
            noisy = (clean + sigma * torch.randn_like(clean)).clamp(0.0, 1.0)
            bound = evidence_lower_bound(network, clean, noisy)
            weight = beta * min(1.0, max(step / (0.15 * steps), 0.05))
            loss = (weight * torch.stack(bound.divergence).sum(dim=0) - bound.log_likelihood).mean() / images[0].numel()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            if torch.isfinite(norm):
                optimizer.step()
                decay = min(0.998, (step + 1) / (step + 10))
                for mean, now in zip(average.parameters(), network.parameters(), strict=True):
                    mean.lerp_(now.detach(), 1.0 - decay)
            step += 1
            if step % 100 == 0 or step == steps:
                state = {"network": network.state_dict(), "average": average.state_dict(), "step": step}
                torch.save({**state, "optimizer": optimizer.state_dict()}, checkpoint)
                nats = torch.stack(bound.divergence).sum(dim=0).mean().item()
                progress.report(
                    step,
                    likelihood=bound.log_likelihood.mean().item() / images[0].numel(),
                    divergence=nats / images[0].numel(),
                    validation_mse=_validate(network, held_out),
                )
    return recalibrate(average, images)


@torch.no_grad()
def recalibrate(network: NVAE, images: Tensor, passes: int = 60) -> NVAE:
    """Re-estimate the batch-norm statistics of averaged weights as plain means over ``passes`` batches."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    network.train()
    for index in list(batches(len(images), 128, seed=0))[:passes]:
        evidence_lower_bound(network, images[index])
    return network.eval()


@torch.no_grad()
def _validate(network: NVAE, images: Tensor) -> float:
    network.eval()
    bound = evidence_lower_bound(network, images)
    return F.mse_loss(bound.reconstruction, images).item()
