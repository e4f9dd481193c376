"""NVAE (Vahdat and Kautz, NeurIPS 2020): a hierarchical VAE, and the purifier made of it (Serez et al., WACV 2025)."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlvgm.checkpoint import CheckpointError, entry, load_tensors, read_checkpoint, read_mapping, unwrapped
from mlvgm.mixture import mixture_mean
from mlvgm.nvae_cells import (
    DecoderCombiner,
    EncoderCombiner,
    FlowCell,
    decoder_cell,
    encoder_cell,
    normed_conv,
    soft_clamp,
)
from mlvgm.purifier import Purified, Purifier

MAX_SCALES = 8

_PUBLISHED_NAMES = {
    "cells_per_group": "num_cells_per_group",
    "latent_channels": "num_latent_per_group",
    "channels": "initial_channels",
    "blocks": "num_pre-post_process_blocks",
    "cells_per_block": "num_pre-post_process_cells",
    "mixtures": "num_logistic_mixtures",
    "expansion": "expansion",
    "kernel": "kernel",
}
"""Of the sizes of an `NVAEConfig` in the entry ``configuration`` of a checkpoint."""


@dataclass(frozen=True)
class NVAEConfig:
    """Shape of an NVAE. ``from_checkpoint`` reads the entry ``configuration`` of a published file.

    Attributes:
        resolution: side of the images, in pixels.
        groups: latents per scale, coarse to fine.
        expansion, kernel: of the decoder's depthwise cells; 6 and 5 in every published file.
    """

    resolution: int
    groups: tuple[int, ...]
    cells_per_group: int
    latent_channels: int
    flow_cells: int
    channels: int
    blocks: int
    cells_per_block: int
    mixtures: int
    expansion: int = 6
    kernel: int = 5

    @classmethod
    def from_checkpoint(cls, configuration: Mapping[str, Any]) -> "NVAEConfig":
        autoencoder = {"expansion": cls.expansion, "kernel": cls.kernel, **configuration["autoencoder"]}
        scales, count = int(autoencoder["num_scales"]), int(autoencoder["num_groups_per_scale"])
        if scales > MAX_SCALES:  # before there is a list of so many
            raise ValueError(f"{scales} scales")
        groups = [count] * scales
        if autoencoder["is_adaptive"]:
            smallest = int(autoencoder["min_groups_per_scale"])
            groups = [max(count >> (scales - 1 - s), smallest) for s in range(scales)]
        sizes = {name: int(autoencoder[published]) for name, published in _PUBLISHED_NAMES.items()}
        flow_cells = int(autoencoder["num_nf_cells"] or 0)
        return cls(int(configuration["resolution"][1]), tuple(groups), flow_cells=flow_cells, **sizes)

    def to_checkpoint(self) -> dict[str, Any]:
        """The entry ``configuration`` of a checkpoint with this shape (groups: equal, or halving coarse-wards)."""
        autoencoder = {
            "num_scales": len(self.groups),
            "num_groups_per_scale": self.groups[-1],
            "is_adaptive": len(set(self.groups)) > 1,
            "min_groups_per_scale": self.groups[0],
            "num_nf_cells": self.flow_cells or None,
            **{published: getattr(self, name) for name, published in _PUBLISHED_NAMES.items()},
        }
        return {"resolution": [3, self.resolution, self.resolution], "autoencoder": autoencoder}

    def side(self, scale: int) -> int:
        """Height and width of the feature maps of a scale, 0 being the coarsest."""
        return self.resolution >> (self.blocks + len(self.groups) - 1 - scale)

    def width(self, scale: int) -> int:
        """Channels of the feature maps of a scale."""
        return self.channels << (self.blocks + len(self.groups) - 1 - scale)

    @property
    def post_expansion(self) -> int:
        """Expansion of the cells after the last latent: half of the decoder's, 3 in every published file."""
        return max(self.expansion // 2, 1)

    def latents(self) -> list[tuple[int, int]]:
        """(scale, group) of every latent, coarse to fine."""
        return [(s, g) for s, count in enumerate(self.groups) for g in range(count)]

    def check(self) -> None:
        """Raises ValueError for a shape that cannot be built (or is too large to be meant)."""
        sizes = (self.resolution, self.mixtures, self.expansion, self.kernel, self.latent_channels, self.channels)
        counts = (self.cells_per_group, self.blocks, self.cells_per_block)
        sane = (
            all(0 < n <= 4096 for n in sizes)
            and all(0 < n <= 16 for n in counts)
            and all(0 < n <= 64 for n in self.groups)
            and 0 <= self.flow_cells <= 16
            and self.kernel % 2 == 1
            and 0 < len(self.groups) <= MAX_SCALES
            and self.side(0) << (self.blocks + len(self.groups) - 1) == self.resolution
        )
        if not sane or self.side(0) < 1:
            raise ValueError(f"impossible NVAE configuration {self}")


def group(cells: Sequence[nn.Module]) -> nn.Sequential:
    """Cells in a row, named as in the checkpoints: cell_0, cell_1, ..."""
    return nn.Sequential(OrderedDict((f"cell_{i}", cell) for i, cell in enumerate(cells)))


class NVAE(nn.Module):
    """The network: ``encode`` to one feature map per latent, ``decode`` with a rule that says what each latent is."""

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        c, top = config, len(config.groups) - 1
        self.const_prior = nn.Parameter(torch.rand(1, c.width(0), c.side(0), c.side(0)))
        self.preprocessing_block = nn.Sequential()
        self.preprocessing_block.add_module("init_conv", normed_conv(3, c.channels, 3))
        self.postprocessing_block = nn.Sequential()
        for b in range(c.blocks):
            width = c.channels << b
            plain = [encoder_cell(width) for _ in range(c.cells_per_block - 1)]
            self.preprocessing_block.add_module(f"block_{b}", group([*plain, encoder_cell(width, 2 * width)]))
            width = c.channels << (c.blocks - b)
            plain = [decoder_cell(width // 2, c.post_expansion, c.kernel) for _ in range(c.cells_per_block - 1)]
            first = decoder_cell(width, c.post_expansion, c.kernel, width // 2)
            self.postprocessing_block.add_module(f"block_{b}", group([first, *plain]))

        self.encoder_tower, self.decoder_tower = nn.ModuleDict(), nn.ModuleDict()
        self.encoder_combiners, self.decoder_combiners = nn.ModuleDict(), nn.ModuleDict()
        self.enc_sampler, self.dec_sampler = nn.ModuleDict(), nn.ModuleDict()
        self.encoder_0 = nn.Sequential(nn.ELU(), normed_conv(c.width(0), c.width(0), 1), nn.ELU())
        flows = nn.ModuleDict()
        for s, count in enumerate(c.groups):
            width, down, up = c.width(s), nn.ModuleDict(), nn.ModuleDict()
            for g in range(count):
                down[f"group_{g}"] = group([encoder_cell(width) for _ in range(c.cells_per_group)])
                self.enc_sampler[f"sampler_{s}:{g}"] = normed_conv(width, 2 * c.latent_channels, 3)
                joint = normed_conv(width + c.latent_channels, width, 1)
                self.decoder_combiners[f"combiner_{s}:{g}"] = DecoderCombiner(joint)
                if c.flow_cells:
                    flows[f"nf_{s}:{g}"] = nn.Sequential(*(FlowCell(c.latent_channels) for _ in range(c.flow_cells)))
                if (s, g) != (0, 0):
                    cells = [decoder_cell(width, c.expansion, c.kernel) for _ in range(c.cells_per_group)]
                    up[f"group_{g}"] = group(cells)
                    self.encoder_combiners[f"combiner_{s}:{g}"] = EncoderCombiner(normed_conv(width, width, 1))
                    sampler = nn.Sequential(nn.ELU(), normed_conv(width, 2 * c.latent_channels, 1))
                    self.dec_sampler[f"sampler_{s}:{g}"] = sampler
            if s > 0:
                down["downsampling"] = encoder_cell(width, c.width(s - 1))
            if s < top:
                up["upsampling"] = decoder_cell(width, c.expansion, c.kernel, c.width(s + 1))
            self.encoder_tower[f"scale_{s}"], self.decoder_tower[f"scale_{s}"] = down, up
        if c.flow_cells:
            self.nf_cells = flows
        self.to_logits = nn.Sequential(nn.ELU(), normed_conv(c.channels, 10 * c.mixtures, 3))

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """One feature map (B, C_s, h_s, w_s) per latent, coarse to fine, of ``images`` (B, 3, H, W) in [0, 1]."""
        x = self.preprocessing_block(2.0 * images - 1.0)
        features: dict[tuple[int, int], Tensor] = {}
        for s in reversed(range(len(self.config.groups))):
            scale: Any = self.encoder_tower[f"scale_{s}"]
            for g in range(self.config.groups[s]):
                x = scale[f"group_{g}"](x)
                features[s, g] = x
            if s > 0:
                x = scale["downsampling"](x)
        features[0, 0] = self.encoder_0(x)
        return tuple(features[latent] for latent in self.config.latents())

    def prior_and_posterior(
        self, scale: int, index: int, x: Tensor, feature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Parameters (mu_p, log_sigma_p, delta_mu_q, delta_log_sigma_q) of one latent, given the ones before it.

        The posterior is relative to the prior: mu_q = mu_p + delta_mu_q (NVAE, section 3.2). Not yet clamped.
        """
        name = f"{scale}:{index}"
        if (scale, index) == (0, 0):
            delta, delta_log_sigma = self.enc_sampler["sampler_0:0"](feature).chunk(2, dim=1)
            return torch.zeros_like(delta), torch.zeros_like(delta), delta, delta_log_sigma
        mu, log_sigma = self.dec_sampler[f"sampler_{name}"](x).chunk(2, dim=1)
        combined = self.encoder_combiners[f"combiner_{name}"](feature, x)
        delta, delta_log_sigma = self.enc_sampler[f"sampler_{name}"](combined).chunk(2, dim=1)
        return mu, log_sigma, delta, delta_log_sigma

    def to_latent(self, scale: int, index: int, x: Tensor) -> Tensor:
        """Decoder features in front of latent (scale, index): its cells, applied to what came before."""
        tower: Any = self.decoder_tower
        if index == 0 and scale > 0:
            x = tower[f"scale_{scale - 1}"]["upsampling"](x)
        if (scale, index) != (0, 0):
            x = tower[f"scale_{scale}"][f"group_{index}"](x)
        return x

    def from_latent(self, scale: int, index: int, x: Tensor, z: Tensor) -> Tensor:
        """Decoder features after latent (scale, index) took the value ``z``."""
        if self.config.flow_cells:
            z = self.nf_cells[f"nf_{scale}:{index}"](z)
        return self.decoder_combiners[f"combiner_{scale}:{index}"](x, z)

    def start(self, batch: int) -> Tensor:
        """The learnt constant that the decoder grows from, (batch, C_0, h_0, w_0)."""
        return self.const_prior.expand(batch, -1, -1, -1)

    def finish(self, x: Tensor) -> Tensor:
        """Mixture parameters (B, 10 M, H, W) from the features after the last latent."""
        return self.to_logits(self.postprocessing_block(x))


class NVAEPurifier(Purifier):
    """Purification by NVAE: each latent is its posterior mean, mixed with a draw from its own prior.

    The prior of a latent depends on the mixed latents before it, so resampling happens inside ``decode``.
    """

    def __init__(self, network: NVAE, temperature: float = 0.6) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature
        config = network.config
        self.image_size = config.resolution
        z = config.latent_channels
        self.noise_shapes = tuple((z, config.side(s), config.side(s)) for s, _ in config.latents())

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network.encode(images)

    def generate(self, encoded: tuple[Tensor, ...], noise: Sequence[Tensor], alphas: Tensor) -> Purified:
        network, codes, mixed = self.network, [], []
        x = network.start(encoded[0].shape[0])
        for i, (s, g) in enumerate(network.config.latents()):
            x = network.to_latent(s, g, x)
            mu, log_sigma, delta, _ = network.prior_and_posterior(s, g, x, encoded[i])
            code = soft_clamp(mu + delta)
            fresh = soft_clamp(mu) + self.temperature * torch.exp(soft_clamp(log_sigma)) * noise[i]
            z = (1.0 - alphas[i]) * code + alphas[i] * fresh
            x = network.from_latent(s, g, x, z)
            codes.append(code)
            mixed.append(z)
        images = (mixture_mean(network.finish(x)) + 1.0) / 2.0
        return Purified(images, tuple(codes), tuple(mixed))


def read_nvae(path: str | Path, temperature: float = 0.6) -> NVAEPurifier:
    """The purifier of a published NVAE checkpoint, whose batch-norm statistics belong to ``temperature``.

    Raises:
        CheckpointError: the file is no such checkpoint, or holds no weights for that temperature.
    """
    checkpoint = read_checkpoint(path)
    configuration = entry(checkpoint, "configuration", path)
    # A published file has one set of batch-norm statistics for each temperature; the default model has one for all.
    plain = Path(path).suffix == ".safetensors"
    weights = read_mapping(checkpoint, "state_dict" if plain else f"state_dict_temp={temperature}", path)
    try:
        config = NVAEConfig.from_checkpoint(configuration)
        # A few bytes can ask for a network that takes minutes to build, whatever tensors there are for it.
        if len(weights) < sum(config.groups) * (config.cells_per_group + config.flow_cells):
            raise ValueError(f"of {len(weights)} tensors: {config}")
        with torch.device("meta"):  # the file's own tensors take the place of these
            network = NVAE(config)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: the entry 'configuration' describes no NVAE ({error!r:.200})") from None
    load_tensors(network, unwrapped(weights, "const_prior") or weights, path)
    return NVAEPurifier(network, temperature).eval().requires_grad_(False)
