"""ONNX graphs in PyTorch, to get gradients: the operators of image classifiers, one function each.

Rounding uses the straight-through estimator (Bengio, Léonard and Courville, "Estimating or propagating gradients
through stochastic neurons", 2013). The result is used only if it agrees with ONNX Runtime.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TorchGraph(nn.Module):
    """A graph of one input and one output as a function of a tensor.

    Raises:
        KeyError: the graph has an operator that is not among `OPERATORS`.
    """

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__()
        self.constants: dict[ir.Value | None, Tensor] = {
            value: _tensor(value.const_value) for value in graph.initializers.values()
        }
        self.nodes = [(OPERATORS[node.op_type], node, _attributes(node)) for node in graph]
        self.input, self.output = graph.inputs[0], graph.outputs[0]

    def forward(self, images: Tensor) -> Tensor:
        known: dict[ir.Value | None, Any] = self.constants | {None: None, self.input: images}
        for function, node, attributes in self.nodes:
            result = function(*(known[value] for value in node.inputs), **attributes)
            known |= zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=False)
        return known[self.output]


def _tensor(tensor: Any) -> Tensor:
    return torch.from_numpy(np.array(tensor.numpy()))


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {
        a.name: _tensor(a.value) if a.type == ir.AttributeType.TENSOR else a.value for a in node.attributes.values()
    }


def _numbers(values: Any) -> list[int]:
    """Axes or shapes as integers: they are attributes in old opsets, and tensors in new ones."""
    return [int(value) for value in values]


def _straight_through(rounded: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, **_: x + (rounded(x) - x).detach()


def _pads(x: Tensor, kernel: list[int], a: dict[str, Any]) -> list[int]:
    """Padding in the order of `F.pad`: the last axis first."""
    n = len(kernel)
    strides, dilations = a.get("strides", [1] * n), a.get("dilations", [1] * n)
    mode = a.get("auto_pad", "NOTSET")
    pads = list(a.get("pads", [0] * 2 * n))
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        for i, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True)):
            size = x.shape[i - n]
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            before = total // 2 if mode == "SAME_UPPER" else total - total // 2
            pads[i], pads[i + n] = before, total - before
    return [side for i in reversed(range(n)) for side in (pads[i], pads[i + n])]


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, group: int = 1, **a: Any) -> Tensor:
    n = weight.ndim - 2
    function = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    x = F.pad(x, _pads(x, list(weight.shape[2:]), a))
    return function(x, weight, bias, a.get("strides", [1] * n), 0, a.get("dilations", [1] * n), group)


def _max_pool(x: Tensor, kernel_shape: list[int], ceil_mode: int = 0, **a: Any) -> Tensor:
    x = F.pad(x, _pads(x, kernel_shape, a), value=-torch.inf)
    strides, dilations = a.get("strides", [1, 1]), a.get("dilations", [1, 1])
    return F.max_pool2d(x, kernel_shape, strides, 0, dilations, bool(ceil_mode))


def _average_pool(
    x: Tensor, kernel_shape: list[int], ceil_mode: int = 0, count_include_pad: int = 0, **a: Any
) -> Tensor:
    pads, strides = _pads(x, kernel_shape, a), a.get("strides", [1, 1])

    def pooled(values: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(values, pads), kernel_shape, strides, 0, bool(ceil_mode))

    return pooled(x) if count_include_pad else pooled(x) / pooled(torch.ones_like(x[:1, :1]))


def _gemm(a: Tensor, b: Tensor, c: Any = None, alpha: float = 1.0, beta: float = 1.0, **t: int) -> Tensor:
    product = alpha * ((a.T if t.get("transA") else a) @ (b.T if t.get("transB") else b))
    return product if c is None else product + beta * c


def _batch_norm(x: Tensor, *statistics: Tensor, epsilon: float = 1e-5, **_: Any) -> Tensor:
    scale, shift, mean, variance = statistics
    return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, epsilon)


def _layer_norm(x: Tensor, scale: Tensor, bias: Any = None, axis: int = -1, epsilon: float = 1e-5, **_: Any) -> Tensor:
    return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduced(x: Tensor, axes: Any = None, keepdims: int = 1, **_: Any) -> Tensor:
        return function(x, _numbers(axes) if axes is not None else list(range(x.ndim)), bool(keepdims))

    return reduced


def _reshape(x: Tensor, shape: Any, **_: Any) -> Tensor:
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(_numbers(shape))])


def _unsqueeze(x: Tensor, axes: Any) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in _numbers(axes)):
        x = x.unsqueeze(axis)
    return x


def _slice(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    axes = _numbers(axes) if axes is not None else range(len(starts))
    for i, axis in enumerate(axes):
        start, end, step = int(starts[i]), int(ends[i]), 1 if steps is None else int(steps[i])
        x = x.index_select(axis, torch.arange(x.shape[axis])[start:end:step])
    return x


def _split(x: Tensor, split: Any = None, axis: int = 0, num_outputs: int = 2) -> tuple[Tensor, ...]:
    return x.split(_numbers(split), axis) if split is not None else x.chunk(num_outputs, axis)


def _pad(x: Tensor, pads: Any, value: Any = None, mode: str = "constant", **_: Any) -> Tensor:
    sides, n = _numbers(pads), x.ndim
    flat = [side for i in reversed(range(n)) for side in (sides[i], sides[i + n])]
    if mode == "constant":
        return F.pad(x, flat, value=float(value) if value is not None else 0.0)
    while flat and flat[-2:] == [0, 0]:
        del flat[-2:]
    return F.pad(x, flat, "reflect" if mode == "reflect" else "replicate")


def _clip(x: Tensor, low: Any = None, high: Any = None, **a: Any) -> Tensor:
    return x.clamp(a.get("min", low), a.get("max", high)) if (low, high, *a.values()) != (None, None) else x


def _cast(x: Tensor, to: int, **_: Any) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, ir.DataType(to).numpy())).dtype
    if x.requires_grad and not dtype.is_floating_point:
        return _straight_through(torch.trunc)(x)
    return x.to(dtype)


def _scales(x: Tensor, values: Tensor, axis: int) -> Tensor:
    return values.view([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]) if values.numel() > 1 else values


def _quantize(x: Tensor, scale: Tensor, zero: Any = None, axis: int = 1, **_: Any) -> Tensor:
    zero = torch.zeros(1, dtype=torch.uint8) if zero is None else zero
    limits = torch.iinfo(zero.dtype)
    steps = _straight_through(torch.round)(x / _scales(x, scale, axis)) + _scales(x, zero, axis)
    return steps.clamp(limits.min, limits.max)


def _dequantize(x: Tensor, scale: Tensor, zero: Any = None, axis: int = 1, **_: Any) -> Tensor:
    steps = x.float() if zero is None else x.float() - _scales(x, zero.float(), axis)
    return steps * _scales(x, scale, axis)


# Of the same name and meaning in PyTorch.
_SAME = "Abs Add Erf Exp Log MatMul Mul Neg Pow Reciprocal Relu Selu Sigmoid Sqrt Sub Tanh Where"

OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name.lower()) for name in _SAME.split()},
    **{name: _straight_through(getattr(torch, name.lower())) for name in ("Ceil", "Floor", "Round")},
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Constant": lambda **a: next(iter(a.values())) if "value" in a else torch.tensor(next(iter(a.values()))),
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Div": lambda a, b: a / b if a.is_floating_point() else a // b,
    "Dropout": lambda x, *_, **__: x,
    "Elu": lambda x, alpha=1.0: F.elu(x, alpha),
    "Expand": lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, _numbers(shape))),
    "Flatten": lambda x, axis=1: x.reshape(int(np.prod(x.shape[:axis])), -1),
    "Gather": lambda x, i, axis=0: x.index_select(axis, i.flatten() % x.shape[axis]).reshape(
        *x.shape[:axis], *i.shape, *x.shape[axis:][1:]
    ),
    "Gelu": F.gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean(list(range(2, x.ndim)), True),
    "GlobalMaxPool": lambda x: x.amax(list(range(2, x.ndim)), True),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "LogSoftmax": lambda x, axis=-1: F.log_softmax(x, axis),
    "LRN": lambda x, size, alpha=1e-4, beta=0.75, bias=1.0: F.local_response_norm(x, size, alpha, beta, bias),
    "Max": lambda *parts: torch.stack(torch.broadcast_tensors(*parts)).amax(0),
    "MaxPool": _max_pool,
    "Min": lambda *parts: torch.stack(torch.broadcast_tensors(*parts)).amin(0),
    "Pad": _pad,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "QuantizeLinear": _quantize,
    "ReduceL2": _reduce(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "Shape": lambda x, **_: torch.tensor(x.shape),
    "Slice": _slice,
    "Softmax": lambda x, axis=-1: F.softmax(x, axis),
    "Softplus": F.softplus,
    "Split": _split,
    "Squeeze": lambda x, axes=None: x.squeeze() if axes is None else x.squeeze(_numbers(axes)),
    "Sum": lambda *parts: sum(parts[1:], parts[0]),
    "Transpose": lambda x, perm=None: x.permute(perm or list(reversed(range(x.ndim)))),
    "Unsqueeze": _unsqueeze,
}
