"""The half-precision form of NVAE: towers and samplers in fp16, all arithmetic of distributions in fp32.

In fp32: gates, the samplers' outputs (means and log standard deviations) and all that follows from them (soft clamps,
noise, interpolation), flows, which act on the few channels of a latent, and the mixture after its convolution.
"""

import torch
from torch import Tensor, nn

from export.families.nvae import Decode, Encode, Gate, MixtureMean, Parts, Prior
from export.precision import FP16, Cast, Excite, copied, fp16_layer, fp16_stage, rounded
from mlvgm.nvae_cells import DecoderCombiner


@fp16_stage.register
def _encode(module: Encode) -> nn.Module:
    made = rounded(copied(module), "means")
    network: Parts = made.network
    network.preprocessing_block = nn.Sequential(Cast(FP16), network.preprocessing_block)
    made.means = nn.ModuleList(_to_single(mean) for mean in module.means)
    return made


@fp16_stage.register
def _decode(module: Decode) -> nn.Module:
    made = rounded(copied(module), "start", "flows", "posteriors")
    if module.latents.start == 0:
        made.start = nn.Sequential(Cast(FP16), fp16_layer(module.start))
    made.enter, made.leave = Cast(FP16), Cast(torch.float32)
    made.posteriors = nn.ModuleDict({name: _to_single(part) for name, part in module.posteriors.items()})
    return made


@fp16_layer.register
def _prior(module: Prior) -> nn.Module:
    made = rounded(copied(module), "mean", "log_sigma")
    made.mean, made.log_sigma = _to_single(module.mean), _to_single(module.log_sigma)
    return made


@fp16_layer.register
def _mixture(module: MixtureMean) -> nn.Module:
    made = copied(module)
    made.conv = _to_single(module.conv)
    return made


@fp16_layer.register
def _gate(module: Gate) -> nn.Module:
    return Excite(module.of_means)


@fp16_layer.register
def _combiner(module: DecoderCombiner) -> nn.Module:
    return _Fp16Combiner(rounded(copied(module)))


def _to_single(module: nn.Module) -> nn.Module:
    return nn.Sequential(fp16_layer(module), Cast(torch.float32))


class _Fp16Combiner(nn.Module):
    """A combiner whose latent input is in fp32."""

    def __init__(self, combiner: nn.Module) -> None:
        super().__init__()
        self.combiner = combiner

    def forward(self, decoded: Tensor, latent: Tensor) -> Tensor:
        return self.combiner(decoded, latent.to(decoded.dtype))
