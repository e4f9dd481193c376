"""Stages in fp16: most layers in fp16, some regions in fp32, and fp32 inputs and outputs.

Layers are cast in PyTorch before they are traced, so every runtime gets the same types and nothing depends on a
compiler's flags. What needs the range or precision of fp32 stays in fp32: statistics, attention, distributions,
interpolation. A batch norm becomes an affine map, whose factors are computed in fp32 and then rounded.

bf16 needs no graph of its own: OpenVINO computes the fp32 graph in bf16, and ONNX Runtime has no bf16 convolution on
CPUs.
"""

import copy
import dataclasses
from functools import singledispatch
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from export.fold import scale_and_shift
from export.stage import Stage

FP16 = torch.float16

LIMITS = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}
"""Largest relative L2 error of a stage against its reference in eager fp32, by precision: that of its computation, or
that in which its weights are stored, whichever is lower."""

ROUNDED = 5e-2
"""The same for a classifier that quantises by itself: there a rounding error can become a whole step."""


def to_fp16(stage: Stage) -> Stage:
    """``stage`` with its module in half precision; a stage that came as an ONNX graph keeps its own precision."""

    def module() -> nn.Module | ir.Model:
        made = stage.module()
        return fp16_stage(made) if isinstance(made, nn.Module) else made

    return dataclasses.replace(stage, module=module)


@singledispatch
def fp16_stage(module: nn.Module) -> nn.Module:
    """The half-precision form of a stage's module, with fp32 inputs and outputs; families register their own."""
    return Fp16Region(fp16_layer(module))


@singledispatch
def fp16_layer(module: nn.Module) -> nn.Module:
    """The half-precision form of a layer: a copy with rounded tensors. ``module`` is not changed."""
    return rounded(copied(module))


def copied(module: nn.Module) -> nn.Module:
    """A shallow copy of ``module``: its tensors and submodules can be replaced without changing ``module``."""
    made = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = dict(module.__dict__[name])
    return made


def rounded(module: nn.Module, *but: str) -> nn.Module:
    """Replace all tensors and submodules of ``module`` by their half-precision form, except those named ``but``."""
    for name, part in module.named_children():
        if name not in but:
            module._modules[name] = fp16_layer(part)
    for name, parameter in module.named_parameters(recurse=False):
        if name not in but:
            module._parameters[name] = nn.Parameter(fp16_tensor(parameter), requires_grad=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in but:
            module._buffers[name] = fp16_tensor(buffer)
    return module


def fp16_tensor(tensor: Tensor) -> Tensor:
    """``tensor`` rounded to fp16 and clamped to its range; unchanged if it has no floating-point numbers."""
    if not tensor.is_floating_point():
        return tensor
    largest = torch.finfo(FP16).max
    return tensor.detach().clamp(-largest, largest).to(FP16)


class Cast(nn.Module):
    """Any tensor to ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


class _InDtype(nn.Module):
    """A module that computes in one type among modules of another; casts its inputs and outputs."""

    inside, outside = FP16, torch.float32

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> Any:
        result = self.module(*(tensor.to(self.inside) for tensor in tensors))
        return result.to(self.outside) if isinstance(result, Tensor) else tuple(t.to(self.outside) for t in result)


class Fp16Region(_InDtype):
    """A half-precision module among fp32 ones: fp32 inputs and outputs."""


class Fp32Island(_InDtype):
    """An fp32 module among half-precision ones: fp16 inputs and outputs."""

    inside, outside = torch.float32, FP16


class Affine(nn.Module):
    """A batch norm in eval mode: x (B, C, ...) times a scale (C,), plus a shift (C,)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, spatial: int) -> None:
        super().__init__()
        shape = (-1, *(1,) * spatial)
        self.register_buffer("scale", fp16_tensor(scale).view(shape))
        self.register_buffer("shift", fp16_tensor(shift).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Excite(nn.Module):
    """Squeeze-and-excite; the means over thousands of pixels, and the ``gate`` computed from them, are in fp32.

    Args:
        gate: channel means (B, C) -> the factors that multiply the channels, (B, C, 1, 1).
    """

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x * cast(Tensor, self.gate(x.float().mean(dim=(2, 3)))).to(FP16)


@fp16_layer.register
def _(norm: nn.BatchNorm2d) -> nn.Module:
    return Affine(*scale_and_shift(norm), spatial=2)


@fp16_layer.register
def _(norm: nn.BatchNorm1d) -> nn.Module:
    return Affine(*scale_and_shift(norm), spatial=0)


for _layer in (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.Softmax):
    fp16_layer.register(_layer, Fp32Island)
