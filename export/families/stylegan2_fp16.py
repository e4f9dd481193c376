"""The half-precision form of both StyleGAN2 families.

In fp32: attention, the mapping network's normalisation, the interpolation, styles and demodulation, and the image to
which the ToRGB layers add. The operands of a modulated convolution are normalised, so that it cannot overflow whatever
the size of styles and weights: a style is divided by its largest magnitude, the weights of an output channel by their
largest magnitude times the square root of their number. The demodulation, in fp32, multiplies by both again
(StyleGAN2-ADA does the same).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.families.stylegan2 import GAIN, Block, Decode, Encode, Resample, StaticConv, StaticToRGB
from export.families.stylegan2_encoders import TransformerEncoder
from export.precision import FP16, Excite, Fp16Region, copied, fp16_layer, fp16_stage, fp16_tensor, rounded
from mlvgm.irse import SqueezeExcite
from mlvgm.stylegan2 import EPSILON

LARGEST = torch.finfo(FP16).max


@fp16_stage.register
def _encode(module: Encode) -> nn.Module:
    made = copied(module)
    encoder = module.encoder
    if isinstance(encoder, TransformerEncoder):
        # All but the pyramid is attention between a few queries and one feature map: little work, but large scores.
        encoder = copied(encoder)
        encoder.pyramid = Fp16Region(fp16_layer(module.encoder.pyramid))  # type: ignore[arg-type]
        made.encoder = encoder
    else:
        made.encoder = Fp16Region(fp16_layer(encoder))
    return made


@fp16_stage.register
def _resample(module: Resample) -> nn.Module:
    made = copied(module)
    made.layers = nn.ModuleList(Fp16Region(fp16_layer(layer)) for layer in module.layers)
    return made


@fp16_stage.register
def _decode(module: Decode) -> nn.Module:
    return rounded(copied(module))


@fp16_layer.register
def _block(module: Block) -> nn.Module:
    return rounded(copied(module), "upsample_skip")


@fp16_layer.register
def _excite(module: SqueezeExcite) -> nn.Module:
    return Excite(nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), module.fc1, nn.ReLU(), module.fc2, nn.Sigmoid()))


class Fp16Conv(StaticConv):
    """A styled convolution: x (B, in, H, W) in half, style (B, d) in fp32 -> (B, out, ., .) in half."""

    size: Tensor

    def __init__(self, layer: StaticConv) -> None:
        nn.Module.__init__(self)
        self.upsample, self.modulation = layer.upsample, layer.modulation
        weight = layer.weight.transpose(0, 1) if layer.upsample else layer.weight
        flat, size = normalised(weight.flatten(1))
        weight = flat.view(weight.shape)
        # One factor carries all the scale, so these are squares of normalised weights, which cannot overflow.
        self.register_buffer("squares", (layer.squares / size.square().T).contiguous())
        self.register_buffer("size", size[:, 0])
        weight = weight.transpose(0, 1) if layer.upsample else weight
        blur = {"blur": layer.blur} if layer.upsample else {}
        for name, tensor in {"weight": weight, "bias": layer.bias, "noise": layer.noise, **blur}.items():
            self.register_buffer(name, fp16_tensor(tensor.contiguous()))

    def factors(self, style: Tensor) -> tuple[Tensor, Tensor]:
        scale, peak = normalised_style(self.modulation(style))
        # rsqrt(sum (w s)^2 + eps) * |w| |s|, with both magnitudes moved into the root.
        norm = GAIN * torch.rsqrt(scale.square() @ self.squares + EPSILON / (peak * self.size).square())
        return scale, norm.clamp(max=LARGEST)  # an infinite factor times a product that underflows to 0 would be NaN


class Fp16ToRGB(nn.Module):
    """A ToRGB layer: x (B, in, H, W) in half, style (B, d) in fp32 -> (B, 3, H, W) in fp32.

    Without demodulation: the magnitudes that were divided out are multiplied in again in fp32.
    """

    weight: Tensor
    size: Tensor
    bias: Tensor

    def __init__(self, layer: StaticToRGB) -> None:
        super().__init__()
        self.modulation = layer.modulation
        weight, size = normalised(layer.weight.flatten(1))
        self.register_buffer("weight", fp16_tensor(weight)[:, :, None, None])
        self.register_buffer("size", size[:, 0])
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, peak = normalised_style(self.modulation(style))
        seen = F.conv2d(x * scale.to(x.dtype)[:, :, None, None], self.weight).float()
        return seen * (self.size * peak)[:, :, None, None] + self.bias


def normalised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (out, n) of magnitude 1 / sqrt(n) at most, and the factors (out, 1) that were divided out."""
    size = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) * math.sqrt(weight.shape[1])
    return weight / size, size


def normalised_style(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Styles (B, in) of magnitude 1 at most, and the largest magnitudes (B, 1), which were divided out."""
    peak = scale.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    return scale / peak, peak


fp16_layer.register(StaticConv, Fp16Conv)
fp16_layer.register(StaticToRGB, Fp16ToRGB)
