"""NVAE rewritten for export: the same numbers as `mlvgm.nvae` with less work.

- Weight norms and batch norms are folded into the convolutions.
- A posterior is ``conv3x3(feature + conv1x1(x))``. The part of ``feature`` moves to ``encode``, where it runs once per
  image and needs z channels per latent instead of the tower's width; the part of ``x`` becomes one 3x3 convolution.
- Nearest upsampling commutes with the 1x1 convolution and SiLU after it, bilinear upsampling with a 1x1 convolution:
  both convolutions run before the upsampling, on a quarter of the pixels.
- The log standard deviations of the posterior and of the mixture are not used, so they are not computed.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.fold import conv, conv_then_norm, norm_then_pointwise, without_weight_norm
from export.precision import copied
from export.stage import Stage
from handlers.manifest import TensorSpec
from mlvgm.mixture import mixture_mean
from mlvgm.nvae import NVAEConfig, NVAEPurifier
from mlvgm.nvae_cells import BRANCH_SCALE, ResidualCell, SqueezeExcite, soft_clamp

Parts = Any
"""A network or cell whose submodules are accessed by name, which mypy cannot check."""


def stages(purifier: NVAEPurifier, kept: int = 0) -> tuple[Stage, ...]:
    """``encode`` and ``decode`` of an NVAE purifier. Resampling is part of ``decode``: a latent's prior depends on the
    latents before it.

    Args:
        kept: the decoding of so many latents is a stage of its own, ``coarse``. Where none of them is resampled, the
            pipeline runs it once for all samples of an image.
    """
    n, side = purifier.n_latents, purifier.image_size
    images = TensorSpec("images", ("B", 3, side, side))
    features = tuple(TensorSpec(f"feature_{i}", ("B", *shape)) for i, shape in enumerate(purifier.noise_shapes))
    noise = tuple(TensorSpec(f"noise_{i}", ("B", *shape)) for i, shape in enumerate(purifier.noise_shapes))
    alphas = TensorSpec("alphas", (n,))

    def published_encode(images: Tensor) -> list[Tensor]:
        return [
            purifier.network.enc_sampler[f"sampler_{s}:{g}"](feature).chunk(2, dim=1)[0]
            for (s, g), feature in zip(purifier.network.config.latents(), purifier.encode(images), strict=True)
        ]

    return (
        Stage("encode", lambda: Encode(without_weight_norm(purifier.network)), published_encode, (images,), features),
        *(_decoding(purifier, range(*part), features, noise, alphas) for part in pairwise(sorted({0, kept, n}))),
    )


def _decoding(
    purifier: NVAEPurifier,
    latents: range,
    features: Sequence[TensorSpec],
    noise: Sequence[TensorSpec],
    alphas: TensorSpec,
) -> Stage:
    """The stage that decodes ``latents``: ``coarse`` where others follow."""
    side, config = purifier.image_size, purifier.network.config
    part = slice(latents.start, latents.stop)
    inputs, outputs = (*features[part], *noise[part], alphas), (TensorSpec("images", ("B", 3, side, side)),)
    last = latents.stop == purifier.n_latents
    if latents.start:
        inputs = (_decoded(config, latents.start), *inputs)
    if not last:
        outputs = (_decoded(config, latents.stop),)
    return Stage(
        "decode" if last else "coarse",
        lambda: Decode(without_weight_norm(purifier.network), purifier.temperature, latents),
        partial(_published_decode, purifier, latents),
        inputs,
        outputs,
    )


def _decoded(config: NVAEConfig, latent: int) -> TensorSpec:
    """The feature map that is decoded of the latents before ``latent``, at its size."""
    scale, _ = config.latents()[latent]
    return TensorSpec("decoded", ("B", config.width(scale), config.side(scale), config.side(scale)))


class Encode(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> for each latent the encoder's part of its posterior mean, (B, z, h, w)."""

    def __init__(self, network: Parts) -> None:
        super().__init__()
        z, samplers = network.config.latent_channels, network.enc_sampler.values()
        self.means = nn.ModuleList(conv(sampler.weight[:z], sampler.bias[:z], padding=1) for sampler in samplers)
        self.network: Parts = copied(network)
        parts = ("preprocessing_block", "encoder_tower", "encoder_0")
        self.network._modules = {name: _fold_cells(network._modules[name]) for name in parts}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features: tuple[Tensor, ...] = self.network.encode(images)
        return tuple(mean(feature) for mean, feature in zip(self.means, features, strict=True))


class Decode(nn.Module):
    """Decodes some ``latents``: their features, their noise, alphas (n,) -> images (B, 3, H, W) in [0, 1].

    If these are not the first latents, the feature map that is decoded of the ones before comes first. If they are not
    the last, the output is the feature map for the ones behind.
    """

    def __init__(self, network: Parts, temperature: float, latents: range) -> None:
        super().__init__()
        self.config: NVAEConfig = network.config
        self.temperature, self.latents = temperature, latents
        self.cells, self.priors, self.posteriors = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.combiners, self.flows = nn.ModuleDict(), nn.ModuleDict()
        self.enter, self.leave = nn.Identity(), nn.Identity()
        every = self.config.latents()
        for i in latents:
            s, g = every[i]
            name = f"{s}:{g}"
            if self.config.flow_cells:
                self.flows[name] = network.nf_cells[f"nf_{name}"]
            if i == 0:
                self.start = FirstCombiner(network)
                continue
            if i > latents.start:
                self.cells[name] = _cells_before(network, s, g)
            self.priors[name] = Prior(network.dec_sampler[f"sampler_{name}"])
            self.posteriors[name] = Posterior(network, name, self.config.side(s))
            self.combiners[name] = network.decoder_combiners[f"combiner_{name}"]
        self.is_last = latents.stop == len(every)
        if self.is_last:
            blocks = [FoldedDecoderCell(cell) for block in network.postprocessing_block for cell in block]
            self.after = nn.Sequential(*blocks)
            self.mixture = MixtureMean(network)
        else:
            self.after = _cells_before(network, *every[latents.stop])

    def forward(self, *tensors: Tensor) -> Tensor:
        given, count = list(tensors), len(self.latents)
        x = self.enter(given.pop(0)) if self.latents.start else None
        features, noise, alphas = given[:count], given[count : 2 * count], given[2 * count]
        for i, feature, fresh in zip(self.latents, features, noise, strict=True):
            name = "{}:{}".format(*self.config.latents()[i])
            if x is None:
                z = (1.0 - alphas[0]) * soft_clamp(feature) + alphas[0] * (self.temperature * fresh)
                x = self.start(self._flow(name, z))
                continue
            if i > self.latents.start:
                x = self.cells[name](x)
            mu, log_sigma = self.priors[name](x)
            code = soft_clamp(mu + feature + self.posteriors[name](x))
            drawn = soft_clamp(mu) + self.temperature * torch.exp(soft_clamp(log_sigma)) * fresh
            z = (1.0 - alphas[i]) * code + alphas[i] * drawn
            x = self.combiners[name](x, self._flow(name, z))
        x = self.after(x)
        return (self.mixture(x) + 1.0) / 2.0 if self.is_last else self.leave(x)

    def _flow(self, name: str, z: Tensor) -> Tensor:
        return self.flows[name](z) if self.config.flow_cells else z


def _cells_before(network: Parts, s: int, g: int) -> nn.Sequential:
    """The decoder's cells that lead to group ``g`` of scale ``s``."""
    cells = [FoldedDecoderCell(c) for c in network.decoder_tower[f"scale_{s}"][f"group_{g}"]]
    if g == 0:
        cells.insert(0, FoldedDecoderCell(network.decoder_tower[f"scale_{s - 1}"]["upsampling"]))
    return nn.Sequential(*cells)


def _published_decode(purifier: NVAEPurifier, latents: range, *tensors: Tensor) -> Tensor:
    """`Decode` with the published operators, from the features that ``Encode`` gives."""
    network: Parts = purifier.network
    given, z, count = list(tensors), network.config.latent_channels, len(latents)
    x = given.pop(0) if latents.start else network.start(len(given[0]))
    features, noise, alphas = given[:count], given[count : 2 * count], given[2 * count]
    for i, feature, drawn in zip(latents, features, noise, strict=True):
        s, g = network.config.latents()[i]
        if i > latents.start or i == 0:
            x = network.to_latent(s, g, x)
        if i == 0:
            mu, log_sigma, mean = torch.zeros_like(feature), torch.zeros_like(feature), feature
        else:
            mu, log_sigma = network.dec_sampler[f"sampler_{s}:{g}"](x).chunk(2, dim=1)
            seen = network.encoder_combiners[f"combiner_{s}:{g}"].conv(x)
            weight = network.enc_sampler[f"sampler_{s}:{g}"].weight[:z]
            mean = mu + feature + F.conv2d(seen, weight, padding=1)
        fresh = soft_clamp(mu) + purifier.temperature * torch.exp(soft_clamp(log_sigma)) * drawn
        x = network.from_latent(s, g, x, (1.0 - alphas[i]) * soft_clamp(mean) + alphas[i] * fresh)
    if latents.stop < purifier.n_latents:
        return network.to_latent(*network.config.latents()[latents.stop], x)
    return (mixture_mean(network.finish(x)) + 1.0) / 2.0


class Gate(nn.Module):
    """Squeeze-and-excite, with the damping factor of the branch folded into the gate."""

    def __init__(self, gate: SqueezeExcite) -> None:
        super().__init__()
        self.of_means = GateOfMeans(gate)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.of_means(x.mean(dim=(2, 3)))


class GateOfMeans(nn.Module):
    """Channel means (B, C) -> the factors that multiply the channels, (B, C, 1, 1)."""

    def __init__(self, gate: SqueezeExcite) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = gate.linear_1, gate.linear_2

    def forward(self, means: Tensor) -> Tensor:
        gate = torch.sigmoid(self.linear_2(torch.relu(self.linear_1(means))))
        return (BRANCH_SCALE * gate)[:, :, None, None]


class FoldedEncoderCell(nn.Module):
    """An encoder cell whose second batch norm is part of the convolution before it."""

    def __init__(self, cell: Parts) -> None:
        super().__init__()
        norm_1, silu, conv_1, norm_2, _, conv_2, gate = cell.residual
        self.skip = cell.skip_connection
        self.branch = nn.Sequential(norm_1, silu, conv_then_norm(conv_1, norm_2), nn.SiLU(), conv_2, Gate(gate))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)


class FoldedDecoderCell(nn.Module):
    """A decoder cell without batch norms; if it upsamples, its pointwise convolutions run before the upsampling."""

    def __init__(self, cell: Parts) -> None:
        super().__init__()
        layers = list(cell.residual)
        self.up = len(layers) == 11
        norm_1, conv_1, norm_2, _, conv_2, norm_3, _, conv_3, norm_4, gate = layers[1:] if self.up else layers
        self.expand = nn.Sequential(conv_then_norm(norm_then_pointwise(norm_1, conv_1), norm_2), nn.SiLU())
        self.depthwise = nn.Sequential(conv_then_norm(conv_2, norm_3), nn.SiLU())
        self.project = nn.Sequential(conv_then_norm(conv_3, norm_4), Gate(gate))
        self.skip = cell.skip_connection.conv if self.up else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch, skip = self.expand(x), self.skip(x)
        if self.up:
            branch = F.interpolate(branch, scale_factor=2.0, mode="nearest")
            skip = F.interpolate(skip, scale_factor=2.0, mode="bilinear", align_corners=True)
        return skip + self.project(self.depthwise(branch))


class FirstCombiner(nn.Module):
    """Combines the first latent with a learned constant, whose part of the convolution is computed in advance."""

    constant: Tensor

    def __init__(self, network: Parts) -> None:
        super().__init__()
        both, width = network.decoder_combiners["combiner_0:0"].conv, network.const_prior.shape[1]
        with torch.no_grad():
            self.register_buffer("constant", F.conv2d(network.const_prior, both.weight[:, :width], both.bias))
        self.conv = conv(both.weight[:, width:], None)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv(z) + self.constant


class Prior(nn.Module):
    """A latent's prior mean and log standard deviation, as two convolutions: splitting channels would copy them."""

    def __init__(self, sampler: Parts) -> None:
        super().__init__()
        self.activation, both = sampler
        self.mean, self.log_sigma = map(conv, both.weight.chunk(2), both.bias.chunk(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.activation(x)
        return self.mean(x), self.log_sigma(x)


class Posterior(nn.Module):
    """The decoder's part of a posterior mean: a 1x1 and a 3x3 convolution as one.

    Because the 3x3 convolution pads with zeros, the bias of the 1x1 one becomes a map that differs at the border.
    """

    border: Tensor

    def __init__(self, network: Parts, name: str, side: int) -> None:
        super().__init__()
        first = network.encoder_combiners[f"combiner_{name}"].conv
        second = network.enc_sampler[f"sampler_{name}"].weight[: network.config.latent_channels]
        with torch.no_grad():
            self.conv = conv(torch.einsum("omyx,mi->oiyx", second, first.weight.flatten(1)), None, padding=1)
            bias = first.bias.view(1, -1, 1, 1).expand(1, -1, side, side)
            self.register_buffer("border", F.conv2d(bias, second, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.border


class MixtureMean(nn.Module):
    """Features -> mean of the mixture in [-1, 1], (B, 3, H, W); see `mlvgm.mixture.mixture_mean`."""

    def __init__(self, network: Parts) -> None:
        super().__init__()
        self.activation, logits = network.to_logits
        self.m = m = network.config.mixtures
        rows = torch.arange(9 * m).view(m, 3, 3) + m
        weights, means, coefficients = torch.arange(m), rows[:, 0].T.flatten(), rows[:, 2].T.flatten()
        used = torch.cat((weights, means, coefficients))
        self.conv = conv(logits.weight[used], logits.bias[used], padding=1)

    def forward(self, x: Tensor) -> Tensor:
        m = self.m
        weights, means, raw = self.conv(self.activation(x)).split((m, 3 * m, 3 * m), dim=1)
        share = torch.softmax(weights, dim=1)
        r, g, b = ((part * share).sum(dim=1, keepdim=True) for part in means.split(m, dim=1))
        k0, k1, k2 = ((part * share).sum(dim=1, keepdim=True) for part in torch.tanh(raw).split(m, dim=1))
        r = r.clamp(-1.0, 1.0)
        g = (g + k0 * r).clamp(-1.0, 1.0)
        b = (b + k1 * r + k2 * g).clamp(-1.0, 1.0)
        return torch.cat((r, g, b), dim=1)


def _fold_cells(module: nn.Module) -> nn.Module:
    """``module`` with all its encoder cells folded, in place."""
    for name, part in module.named_children():
        setattr(module, name, FoldedEncoderCell(part) if isinstance(part, ResidualCell) else _fold_cells(part))
    return module
