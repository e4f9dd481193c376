"""Pictures of how far a training run is: what the latents hold, and how the figures went."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mlvgm.nvae import NVAE, NVAEPurifier

IMAGES, DPI = 8, 90


@torch.no_grad()
def draw_latents(network: NVAE, images: Tensor, temperature: float, file: Path) -> None:
    """Write a sheet: images, their reconstructions, these with the later latents resampled, and draws from the prior.

    Args:
        network: ready for inference.
        images: (B, 3, S, S) in [0, 1]; the first `IMAGES` are shown.
    """
    images = images[:IMAGES]
    purifier = NVAEPurifier(network, temperature).eval()
    n = purifier.n_latents
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(len(images), *s, generator=generator).to(images.device) for s in purifier.noise_shapes]
    rows = [("images", images)]
    for kept in range(n, -1, -1):
        alphas = [float(i >= kept) for i in range(n)]
        name = {n: "reconstructed", 0: "all from the prior"}.get(kept, f"kept: {kept} of {n} latents")
        rows.append((name, purifier.purify(images, noise, alphas).images))
    side = max(1.0, images.shape[-1] / DPI)  # of an image in inches: at least a dot for each pixel
    figure = Figure(figsize=(IMAGES * side, (side + 0.25) * len(rows)), layout="constrained")
    for axes, (name, row) in zip(figure.subplots(len(rows)), rows, strict=True):
        axes.imshow(torch.cat(tuple(row.clamp(0, 1)), dim=2).permute(1, 2, 0).cpu(), interpolation="nearest")
        axes.set_title(name, loc="left", fontsize=9)
        axes.axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI)


def draw_curve(reports: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Plot what `mlvgm.training.nvae` reported: likelihood, divergence of each latent, error on held-out images."""
    steps = [report["step"] for report in reports]
    lines = {"log_likelihood": "log likelihood (nats per value)", "validation_mse": "held-out images: squared error"}
    if reports[-1]["answer_divergence"] is not None:
        lines["answer_divergence"] = "divergence of the classifier's answers (nats)"
    figure = Figure(figsize=(4 + 4 * len(lines), 3.5), layout="constrained")
    divergence, *others = figure.subplots(1, 1 + len(lines))
    divergence.stackplot(steps, np.array([report["divergence"] for report in reports]).T)
    divergence.set(title="divergence by latent, coarse at the bottom", xlabel="step")
    for axes, (key, title) in zip(others, lines.items(), strict=True):
        axes.plot(steps, [report[key] for report in reports])
        axes.set(title=title, xlabel="step", yscale="log" if key == "validation_mse" else "linear")
    figure.savefig(file, dpi=DPI)
