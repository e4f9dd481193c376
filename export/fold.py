"""Rewrites that remove work and keep the numbers: batch norms and weight norms become part of a convolution."""

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)
Module = TypeVar("Module", bound=nn.Module)


def fast(network: Module, device: str = "cpu") -> Module:
    """A copy on ``device`` that computes the same up to rounding, and its gradients in about half the time on a CPU."""
    plain = fold_batch_norms(without_weight_norm(copy.deepcopy(network)).eval()).requires_grad_(False)
    return cast(Module, plain.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]


def without_weight_norm(module: nn.Module) -> nn.Module:
    """``module`` with plain convolutions in the place of weight-normed ones; all other tensors are shared with it."""
    module = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    # Replaced, not `remove_parametrizations`: that changes the class of the copy, which the original shares.
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and parametrize.is_parametrized(child):
                plain = conv(child.weight, child.bias, stride=child.stride, padding=child.padding, groups=child.groups)
                setattr(parent, name, plain)
    return module


def conv(weight: Tensor, bias: Tensor | None, **options: Any) -> nn.Conv2d:
    """A convolution with these weights (out, in / groups, h, w) and biases (out,), in float32."""
    outputs, inputs, *kernel = weight.shape
    inputs *= options.get("groups", 1)
    layer = nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]), bias=bias is not None, device="meta", **options)
    return _filled(layer, weight, bias)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with these weights (out, in) and biases (out,), in float32."""
    return _filled(nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta"), weight, bias)


def _filled(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    values = {"weight": weight, "bias": bias}
    floats = {name: values.detach().float().contiguous() for name, values in values.items() if values is not None}
    layer.load_state_dict(floats, assign=True)
    return layer.requires_grad_(False)


def conv_then_norm(conv: nn.Module, norm: nn.Module) -> nn.Conv2d:
    """One convolution that does what ``conv`` and then ``norm`` do in eval mode."""
    return fuse_conv_bn_eval(cast(nn.Conv2d, conv).eval(), cast(nn.BatchNorm2d, norm).eval())


def norm_then_pointwise(norm: nn.BatchNorm2d, pointwise: nn.Conv2d) -> nn.Conv2d:
    """One 1x1 convolution that does what ``norm`` and then ``pointwise`` do: exactly, for there is no padding."""
    if pointwise.kernel_size != (1, 1):
        raise ValueError("a norm in front of a padded convolution cannot be folded exactly")
    scale, shift = scale_and_shift(norm)
    bias = pointwise.weight.flatten(1) @ shift
    return conv(pointwise.weight * scale[:, None, None], bias if pointwise.bias is None else bias + pointwise.bias)


def scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The affine map (C,), (C,) that a batch norm is in eval mode."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = norm.weight / torch.sqrt(variance + norm.eps)
    return scale.detach(), (norm.bias - mean * scale).detach()


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """``model`` with every batch norm folded that directly follows a convolution or a linear layer.

    ``model``, which must be in eval mode, is not changed; layers that are not folded are shared with it. A model that
    cannot be traced symbolically is returned unfolded: folding only saves time.
    """
    try:
        return fuse(model, inplace=True)  # in place of the traced module, not of ``model``
    except Exception:  # tracing runs the user's own code, which may raise anything
        return model
