"""Rewrites that remove work and keep the numbers: batch norms and weight norms become part of a convolution."""

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval


def without_weight_norm(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose weight-normed convolutions are plain ones."""
    module = copy.deepcopy(module)
    # Replaced, not un-parametrised: a deep copy shares the class that holds the parametrisation with its original.
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and parametrize.is_parametrized(child):
                setattr(parent, name, _plain(child))
    return module


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    with torch.no_grad():
        plain.weight.copy_(conv.weight)
        if plain.bias is not None and conv.bias is not None:
            plain.bias.copy_(conv.bias)
    return plain.requires_grad_(False)


def conv_then_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution that does what ``conv`` and then ``norm`` do in eval mode."""
    return fuse_conv_bn_eval(conv.eval(), norm.eval())


def linear_then_norm(linear: nn.Linear, norm: nn.BatchNorm1d) -> nn.Linear:
    """One linear layer that does what ``linear`` and then ``norm`` do in eval mode."""
    scale, shift = scale_and_shift(norm)
    folded = nn.Linear(linear.in_features, linear.out_features, device="meta")  # no weights to be thrown away
    folded.weight = nn.Parameter(linear.weight.detach() * scale[:, None], requires_grad=False)
    bias = shift if linear.bias is None else shift + linear.bias.detach() * scale
    folded.bias = nn.Parameter(bias, requires_grad=False)
    return folded


def norm_then_pointwise(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """One 1x1 convolution that does what ``norm`` and then ``conv`` do in eval mode. Exact: there is no padding."""
    if conv.kernel_size != (1, 1):
        raise ValueError("a norm in front of a padded convolution cannot be folded exactly")
    scale, shift = scale_and_shift(norm)
    folded = nn.Conv2d(conv.in_channels, conv.out_channels, 1)
    matrix = conv.weight.flatten(1)
    with torch.no_grad():
        folded.weight.copy_((matrix * scale)[:, :, None, None])
        bias = matrix @ shift
        folded.bias.copy_(bias if conv.bias is None else bias + conv.bias)  # type: ignore[union-attr]
    return folded


def scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The affine map (C,), (C,) that a batch norm is in eval mode."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = norm.weight / torch.sqrt(variance + norm.eps)
    return scale.detach(), (norm.bias - mean * scale).detach()


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """``model`` with every batch norm folded that directly follows a convolution or a linear layer.

    Folded layers are new ones; all others are shared with ``model``, which is in eval mode and stays as it is: the head
    of a large classifier is gigabytes. A model that cannot be traced symbolically comes back as it is: folding only
    saves time.
    """
    try:
        graph = fx.symbolic_trace(model)
    except Exception:  # tracing runs the user's own code, which may raise anything
        return model
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) > 1:
            continue
        layer, norm = modules[before.target], modules[node.target]
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            folded: nn.Module = fuse_conv_bn_eval(layer, norm)
        elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
            folded = linear_then_norm(layer, norm)
        else:
            continue
        graph.set_submodule(before.target, folded)
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph
