"""Discretised mixture of logistics over RGB pixels (PixelCNN++, Salimans et al., ICLR 2017, section 2.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_LOG_SCALE = -7.0


def mixture_mean(logits: Tensor) -> Tensor:
    """Expected image of the mixture.

    Args:
        logits: (B, 10 M, H, W) for M mixtures: see ``split``.

    Returns:
        (B, 3, H, W) in [-1, 1]; green is chained to red, and blue to both, each clamped first.
    """
    weights, means, _, coefficients = split(logits)
    share = torch.softmax(weights, dim=1)
    red, green, blue = (torch.sum(means[:, c] * share, dim=1) for c in range(3))
    k0, k1, k2 = (torch.sum(coefficients[:, c] * share, dim=1) for c in range(3))
    red = red.clamp(-1.0, 1.0)
    green = (green + k0 * red).clamp(-1.0, 1.0)
    blue = (blue + k1 * red + k2 * green).clamp(-1.0, 1.0)
    return torch.stack((red, green, blue), dim=1)


def mixture_log_likelihood(logits: Tensor, images: Tensor) -> Tensor:
    """Log likelihood (B,), in nats, of 8-bit ``images`` scaled to [-1, 1], (B, 3, H, W)."""
    weights, means, log_scales, coefficients = split(logits)
    x = images.unsqueeze(2)
    red, green = x[:, 0], x[:, 1]
    centred = torch.stack(
        (
            red - means[:, 0],
            green - means[:, 1] - coefficients[:, 0] * red,
            x[:, 2] - means[:, 2] - coefficients[:, 1] * red - coefficients[:, 2] * green,
        ),
        dim=1,
    )
    inverse = torch.exp(-log_scales)
    upper, lower = inverse * (centred + 1.0 / 255.0), inverse * (centred - 1.0 / 255.0)
    mass = torch.sigmoid(upper) - torch.sigmoid(lower)
    middle = inverse * centred
    density = middle - log_scales - 2.0 * F.softplus(middle) - torch.log(torch.tensor(127.5))
    log_mass = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-10)), density)
    log_mass = torch.where(x < -0.999, upper - F.softplus(upper), log_mass)
    log_mass = torch.where(x > 0.999, -F.softplus(lower), log_mass)
    per_mixture = log_mass.sum(dim=1) + torch.log_softmax(weights, dim=1)
    return torch.logsumexp(per_mixture, dim=1).sum(dim=(1, 2))


def split(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights (B, M, H, W), then means, log scales and tanh coefficients, (B, 3, M, H, W) each."""
    m = logits.shape[1] // 10
    # The published channel order: M weights, then for each mixture three rows (mean, log scale, coefficient) of RGB.
    rows = logits[:, m:].unflatten(1, (m, 3, 3)).transpose(1, 3)
    means, log_scales, raw = rows.unbind(dim=2)
    return logits[:, :m], means, log_scales.clamp(min=MIN_LOG_SCALE), torch.tanh(raw)
