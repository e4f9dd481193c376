"""A classifier that is an ONNX file: a new graph around its own, for whatever it takes and gives.

What can be adapted with certainty is: another side of the images, channels last, another type, a fixed batch, and
probabilities in the place of logits. The rest is refused in one line.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper, version_converter
from torch import Tensor, nn

from export.onnx_autograd import TorchGraph
from export.onnx_graph import free_batch, graphs, load_graph, nodes, rename, save_graph
from export.precision import LIMITS, ROUNDED
from export.probe import SMALLEST, ClassifierError, first_line, probe
from handlers.manifest import FileDigest
from mlvgm.checkpoint import kind_of
from mlvgm.recipe import ClassifierRecipe

_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.DOUBLE: "float64",
    TensorProto.UINT8: "uint8",
}
_OLDEST_OPSET = 8  # the first in which all operators that are added here broadcast
_ROUNDING = ("Round", "Floor", "Ceil", "QuantizeLinear", "DynamicQuantizeLinear")  # as does QLinear...
_DIRECTIONS, _STEP = 64, 0.02  # of an estimated gradient; the step in units of the [0, 1] image
_NAMES = ("images", "logits")  # of the new graph's input and output

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]


class OnnxClassifier(nn.Module):
    """The file as it is, run by ONNX Runtime: images (B, 3, H, W) in [0, 1] -> logits (B, C).

    What it takes and gives otherwise is adapted here outside of the graph: the reference for `graph`, which has it
    inside.

    Attributes:
        adapted: what was, each as the end of "the classifier is adapted: it ...".
        tolerance: relative error that `graph` may have: a file that computes in half precision, or rounds to whole
            numbers, makes small differences larger.

    Raises:
        ClassifierError: naming the file and what is wrong with it.
    """

    digest: Tensor

    def __init__(self, file: Path, recipe: ClassifierRecipe, image_size: int, n_classes: int) -> None:
        super().__init__()
        self.file, self.image_size, self.n_classes = file, image_size, n_classes
        self._model = _load(file)
        self._takes = _Signature.of(self._model, file, image_size, n_classes)
        self.adapted = self._takes.differences(image_size)
        mean, std = recipe.mean, recipe.std
        if len(mean) != 3 or len(std) != 3 or 0 in std:
            raise ClassifierError(f"{file}: mean and std must be three numbers each, std not 0: {mean}, {std}")
        if self._takes.dtype == "uint8":
            if (mean, std) not in (((0.0,) * 3, (1.0,) * 3), ((0.0,) * 3, (1 / 255,) * 3)):
                raise ClassifierError(
                    f"{file}: takes pixels of 0 to 255, which mean and std cannot normalise: leave both out"
                )
            std = (1 / 255,) * 3
        self._mean, self._std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
        self._session = _session(str(file), str(file))
        sha256 = bytes.fromhex(FileDigest.of(file).sha256)
        self.register_buffer("digest", torch.frombuffer(bytearray(sha256), dtype=torch.uint8))
        self._probabilities = False
        self._autograd: tuple[TorchGraph | None] | None = None
        self._probabilities = probe(self, image_size, n_classes, str(file)).probabilities
        if self._probabilities:
            self.adapted.append("gives probabilities, as of a softmax: their logarithms are the logits")
        self.tolerance = _tolerance(self._model, self._takes.dtype)
        if self._takes.batch:
            self._free_batch()

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            logits: Tensor = _Differentiable.apply(images, self)
            return logits
        side = self._takes.side
        if side != self.image_size:
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        x = (images - self._mean) / self._std
        if self._takes.dtype == "uint8":
            x = torch.floor(x + 0.5).clamp(0, 255)
        if self._takes.channels_last:
            x = x.permute(0, 2, 3, 1)
        array = np.ascontiguousarray(x.numpy().astype(self._takes.dtype))
        step = self._takes.batch or len(array)
        parts = [self._run(array[i : i + step], step) for i in range(0, len(array), step)]
        logits = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        return torch.log(logits.clamp(min=SMALLEST)) if self._probabilities else logits

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnnxClassifier":
        return self  # it never changes, and a session cannot be copied

    def graph(self) -> onnx.ModelProto:
        """images (B, 3, H, W) in [0, 1] -> logits (B, C), with what was adapted inside."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        rename(model, {name: _own(name) for name in _NAMES})
        graph, takes = model.graph, self._takes
        source, result = _Chain("images"), _Chain(_own(takes.output))
        if takes.side != self.image_size:
            rows = _resampling(self.image_size, takes.side)
            source.add("MatMul", constant=rows, first=True).add("MatMul", constant=rows.T)
        if self._mean.any():
            source.add("Sub", constant=self._mean.numpy())
        if (self._std != 1).any():
            source.add("Div", constant=self._std.numpy())
        if takes.dtype == "uint8":
            source.add("Add", constant=np.float32(0.5)).add("Floor")
            source.add("Max", constant=np.float32(0)).add("Min", constant=np.float32(255))
        if takes.channels_last:
            source.add("Transpose", perm=[0, 2, 3, 1])
        if takes.dtype != "float32":
            source.add("Cast", to=helper.np_dtype_to_tensor_dtype(np.dtype(takes.dtype)))
        given = graph.output[0].type.tensor_type.elem_type
        if given != TensorProto.FLOAT:
            result.add("Cast", to=TensorProto.FLOAT)
        if self._probabilities:
            result.add("Max", constant=np.float32(SMALLEST)).add("Log")
        all_nodes = [*source.end(_own(takes.input)), *graph.node, *result.end("logits")]
        del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
        graph.node.extend(all_nodes)
        graph.initializer.extend([*source.constants, *result.constants])
        side = self.image_size
        graph.input.append(helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", 3, side, side]))
        graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", self.n_classes]))
        model.ir_version = max(model.ir_version, 4)  # before, weights had to be inputs too
        return model

    def vjp(self, images: Tensor, gradient: Tensor) -> Tensor:
        """The gradient (B, 3, H, W) at ``images`` of what has the ``gradient`` (B, C) at their logits.

        Exact where all operators have derivatives here (`export.onnx_autograd`), else estimated from the logits.
        """
        if self._autograd is None:
            self._autograd = (self._differentiable(),)
        (module,) = self._autograd
        if module is None:
            return _estimated(self, images, gradient)
        with torch.enable_grad():
            source = images.detach().requires_grad_()
            return torch.autograd.grad(module(source), source, gradient)[0]

    def _differentiable(self) -> TorchGraph | None:
        images = torch.rand(2, 3, self.image_size, self.image_size, generator=torch.Generator().manual_seed(2))
        try:
            module = TorchGraph(self.graph())
            found, expected = module(images), self(images)
            error = float((found - expected).norm() / expected.norm())
            if error <= max(10 * LIMITS["fp32"], self.tolerance):
                return module
            reason = f"another result in PyTorch, {error:.0e} off"
        except Exception as error:  # whatever an operator of somebody's graph makes PyTorch raise
            reason = f"{type(error).__name__}: {first_line(error)}"
        logger.warning("%s: gradients are estimated, which is slow and makes attacks weaker (%s)", self.file, reason)
        return None

    def _free_batch(self) -> None:
        """Take the fixed batch out of the graph, if it then gives for any number of images what it gave for its own."""
        images = torch.rand(3, 3, self.image_size, self.image_size, generator=torch.Generator().manual_seed(1))
        expected = self(images).numpy()
        for attempt in (lambda: None, lambda: free_batch(self._model, self._takes.batch)):
            attempt()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "classify.onnx"
                save_graph(self.graph(), file)
                try:
                    session = _session(str(file), str(self.file))
                    found = [session.run(None, {"images": images[:n].numpy()})[0] for n in (1, 2, 3)]
                except Exception:  # ONNX Runtime's exceptions share no base class
                    continue
            pairs = [(logits, expected[:n]) for logits, n in zip(found, (1, 2, 3), strict=True)]
            if all(a.shape == b.shape and np.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in pairs):
                return
        raise ClassifierError(
            f"{self.file}: takes a fixed batch of {self._takes.batch}, which is written all over its graph: "
            "export it with a dynamic batch axis"
        )

    def _run(self, array: NDArray[Any], rows: int) -> Floats:
        missing = rows - len(array)
        padded = np.concatenate([array, array[:1].repeat(missing, axis=0)]) if missing else array
        try:
            outputs: Floats = self._session.run(None, {self._takes.input: padded})[0]
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ClassifierError(f"{self.file}: ONNX Runtime cannot run it ({first_line(error)})") from None
        return outputs[: len(array)]


class _Differentiable(torch.autograd.Function):
    """The logits of an `OnnxClassifier`, and its ``vjp`` as their derivative."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, classifier: OnnxClassifier) -> Tensor:
        ctx.save_for_backward(images)
        ctx.classifier = classifier
        return classifier(images.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (images,) = ctx.saved_tensors
        return ctx.classifier.vjp(images, gradients[0]), None


def _estimated(classify: Callable[[Tensor], Tensor], images: Tensor, gradient: Tensor) -> Tensor:
    """A gradient from differences along random directions (Ilyas et al., ICML 2018, section 2)."""
    total, generator = torch.zeros_like(images), torch.Generator().manual_seed(0)
    for _ in range(_DIRECTIONS):
        step = _STEP * torch.randn(images.shape, generator=generator)
        change = ((classify(images + step) - classify(images - step)) * gradient).sum(dim=1)
        total += change.view(-1, 1, 1, 1) * step / (2 * _STEP**2 * _DIRECTIONS)
    return total


@dataclass(frozen=True)
class _Signature:
    """What a file takes.

    Attributes:
        input, output: names of its two tensors.
        dtype: of its input, as numpy calls it.
        channels_last: whether it takes (B, H, W, 3).
        side: of its square images, in pixels.
        batch: the only number of images that it takes at once; 0 for any.
    """

    input: str
    output: str
    dtype: str
    channels_last: bool
    side: int
    batch: int

    @classmethod
    def of(cls, model: onnx.ModelProto, file: Path, image_size: int, n_classes: int) -> "_Signature":
        graph = model.graph
        weights = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
        inputs, outputs = [value for value in graph.input if value.name not in weights], list(graph.output)
        if len(inputs) != 1 or len(outputs) != 1:
            raise ClassifierError(
                f"{file}: has {len(inputs)} inputs and {len(outputs)} outputs; it must have one of each"
            )
        (given, shape), (result, gives) = (_type_of(value) for value in (inputs[0], outputs[0]))
        if given not in _TYPES:
            raise ClassifierError(f"{file}: its input {inputs[0].name!r} is {_name(given)}, not float32 or uint8")
        if result not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
            raise ClassifierError(f"{file}: its output {outputs[0].name!r} is {_name(result)}: no logits")
        shape = [None] * 4 if shape is None else shape
        channels_last = len(shape) == 4 and shape[3] == 3 and shape[1] != 3
        sides = shape[1:3] if channels_last else shape[2:]
        if len(shape) != 4 or (not channels_last and shape[1] not in (None, 3)) or len({*sides} - {None}) > 1:
            raise ClassifierError(
                f"{file}: its input {inputs[0].name!r} has shape {shape}, not that of square images of three channels, "
                f"[None, 3, {image_size}, {image_size}]"
            )
        if gives is not None and (len(gives) != 2 or gives[1] not in (None, n_classes)):
            raise ClassifierError(
                f"{file}: its output {outputs[0].name!r} has shape {gives}, not {[None, n_classes]} for the recipe's "
                f"{n_classes} classes"
            )
        side = next((size for size in sides if size), image_size)
        return cls(inputs[0].name, outputs[0].name, _TYPES[given], channels_last, side, shape[0] or 0)

    def differences(self, image_size: int) -> list[str]:
        """From (B, 3, H, W) in float32 at the purifier's size."""
        found = {
            f"takes {self.side} px: images of {image_size} px are resized, bilinearly": self.side != image_size,
            "takes channels last": self.channels_last,
            f"takes {self.dtype}": self.dtype != "float32",
            f"takes a fixed batch of {self.batch}, which is made free": self.batch > 0,
        }
        return [words for words, holds in found.items() if holds]


class _Chain:
    """Nodes one behind the other, with the constants they take."""

    def __init__(self, start: str) -> None:
        self.last, self.nodes, self.constants = start, list[NodeProto](), list[TensorProto]()
        self.prefix = f"mlvgm/{start}"

    def add(self, operator: str, constant: Any = None, first: bool = False, **attributes: Any) -> "_Chain":
        """``operator`` on what came last, and on ``constant``, which stands in front of that with ``first``."""
        inputs, name = [self.last], f"{self.prefix}/{len(self.nodes)}"
        if constant is not None:
            self.constants.append(numpy_helper.from_array(np.asarray(constant, np.float32), f"{name}/constant"))
            inputs.insert(0 if first else 1, f"{name}/constant")
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        self.last = name
        return self

    def end(self, name: str) -> list[NodeProto]:
        """The nodes, whose last tensor is ``name``."""
        if not self.nodes:
            self.add("Identity")
        self.nodes[-1].output[0] = name
        return self.nodes


def _own(name: str) -> str:
    """The name that a tensor of the file has in the new graph."""
    return f"mlvgm/own/{name}" if name in _NAMES else name


def _load(file: Path) -> onnx.ModelProto:
    try:
        kind = kind_of(file)
    except OSError as error:
        raise ClassifierError(f"{file}: cannot be read ({error.strerror})") from None
    if kind:
        raise ClassifierError(f"{file}: is {kind}: not a valid ONNX file")
    try:
        model = load_graph(file)
        opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        return version_converter.convert_version(model, 13) if 0 < opset < _OLDEST_OPSET else model
    except Exception as error:  # onnx raises whatever protobuf raises
        raise ClassifierError(f"{file}: not a valid ONNX file ({first_line(error)})") from None


def _tolerance(model: onnx.ModelProto, dtype: str) -> float:
    operators = {node.op_type for node in nodes(model)}
    if dtype == "uint8" or any(name.startswith("QLinear") or name in _ROUNDING for name in operators):
        return ROUNDED
    weights = {tensor.data_type for graph in graphs(model.graph) for tensor in graph.initializer}
    return LIMITS["fp16"] if dtype == "float16" or TensorProto.FLOAT16 in weights else 0.0


def _session(path: str, name: str) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is told by an exception
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ClassifierError(f"{name}: ONNX Runtime cannot run it ({first_line(error)})") from None


def _type_of(value: ValueInfoProto) -> tuple[int, list[int | None] | None]:
    """Element type, and shape with None for what is not fixed; None for a shape that is not told."""
    tensor = value.type.tensor_type
    shape = [dim.dim_value or None for dim in tensor.shape.dim] if tensor.HasField("shape") else None
    return tensor.elem_type, shape


def _name(kind: int) -> str:
    return TensorProto.DataType.Name(kind).lower() if kind else "no tensor"


def _resampling(size: int, to: int) -> Floats:
    """(to, size): what bilinear resampling does to a row of pixels, as a matrix; without aliasing where it shrinks."""
    rows: Floats = F.interpolate(torch.eye(size)[None, None], (to, size), mode="bilinear", antialias=True)[0, 0].numpy()
    return rows
