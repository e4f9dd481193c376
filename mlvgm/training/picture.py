"""Pictures of how far a training run is: what the latents hold, and how the figures went."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mlvgm.nvae import NVAE, NVAEPurifier

IMAGES, MIN_SIDE, MARGIN, LABEL = 8, 64, 4, 190


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
    file.parent.mkdir(parents=True, exist_ok=True)
    _sheet([(name, _pixels(row)) for name, row in rows]).save(file)


def draw_curve(log: Path, file: Path) -> None:
    """Plot what `mlvgm.training.nvae` logged: likelihood, divergence of each latent, error on held-out images."""
    import matplotlib.figure

    reports = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [report["step"] for report in reports]
    with_classifier = reports[-1]["answer_divergence"] is not None
    figure = matplotlib.figure.Figure(figsize=(16 if with_classifier else 12, 3.5), layout="constrained")
    likelihood, divergence, error, *rest = figure.subplots(1, 4 if with_classifier else 3)
    likelihood.plot(steps, [report["log_likelihood"] for report in reports])
    likelihood.set_title("log likelihood (nats per value)")
    divergence.stackplot(steps, np.array([report["divergence"] for report in reports]).T)
    divergence.set_title("divergence by latent, coarse at the bottom")
    error.plot(steps, [report["validation_mse"] for report in reports])
    error.set_title("held-out images: squared error")
    error.set_yscale("log")
    for answers in rest:
        answers.plot(steps, [report["answer_divergence"] for report in reports])
        answers.set_title("divergence of the classifier's answers (nats)")
    for axes in (likelihood, divergence, error, *rest):
        axes.set_xlabel("step")
    figure.savefig(file, dpi=90)


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _sheet(rows: Sequence[tuple[str, NDArray[np.uint8]]]) -> Image.Image:
    side = max(MIN_SIDE, rows[0][1].shape[1])
    pitch = side + MARGIN
    sheet = Image.new("RGB", (LABEL + IMAGES * pitch, len(rows) * pitch + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for r, (name, images) in enumerate(rows):
        top = MARGIN + r * pitch
        draw.text((MARGIN, top + side // 2 - 8), name, "black", font)
        for c, image in enumerate(images):
            picture = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (LABEL + c * pitch, top))
    return sheet
