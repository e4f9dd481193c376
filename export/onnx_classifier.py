"""A classifier in an ONNX file, adapted to the pipeline's images and logits by operators added to its graph.

Adapted are another image size, channels last, another element type, a fixed batch, and probabilities instead of
logits. Anything else is refused with an error of one line.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from export.onnx_autograd import TorchGraph
from export.onnx_graph import Writer, declare, free_batch, load_graph, nodes, save_graph, values
from export.precision import LIMITS, ROUNDED
from export.probe import PROBABILITIES, SMALLEST, ClassifierError, first_line, probe
from handlers.arrays import FloatArray
from handlers.manifest import FileDigest
from mlvgm.checkpoint import kind_of
from mlvgm.recipe import ClassifierRecipe

_LOGITS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_IMAGES = (*_LOGITS, ir.DataType.UINT8)
_ROUNDING = ("Round", "Floor", "Ceil", "QuantizeLinear", "DynamicQuantizeLinear")  # as does QLinear...
_DIRECTIONS, _STEP = 64, 0.02  # of an estimated gradient; the step in units of the [0, 1] image

logger = logging.getLogger(__name__)


class OnnxClassifier(nn.Module):
    """The file as it is, run by ONNX Runtime: images (B, 3, H, W) in [0, 1] -> logits (B, C).

    Images and logits are adapted outside of the graph, in PyTorch: the reference of `graph`, which has the same steps
    as operators.

    Attributes:
        adapted: what was adapted, each as the end of "the classifier is adapted: it ...".
        tolerance: relative error allowed to `graph`: a file that computes in half precision or quantises amplifies
            rounding errors.

    Raises:
        ClassifierError: naming the file and what is wrong with it.
    """

    digest: Tensor

    def __init__(self, file: Path, recipe: ClassifierRecipe, image_size: int, n_classes: int) -> None:
        super().__init__()
        self.file, self.image_size, self.n_classes = file, image_size, n_classes
        model = _load(file)
        self._takes = _Signature.of(model.graph, file, image_size, n_classes)
        self.adapted = self._takes.differences(image_size)
        mean, std = recipe.mean, recipe.std
        if len(mean) != 3 or len(std) != 3 or 0 in std:
            raise ClassifierError(f"{file}: mean and std must be three numbers each, std not 0: {mean}, {std}")
        if self._takes.dtype == "uint8":
            if (mean, std) not in (((0.0,) * 3, (1.0,) * 3), ((0.0,) * 3, (1 / 255,) * 3)):
                raise ClassifierError(f"{file}: takes uint8 pixels, which are never normalised: leave out mean and std")
            std = (1 / 255,) * 3
        self._mean, self._std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
        self._session = _session(str(file), str(file))
        sha256 = bytes.fromhex(FileDigest.of(file).sha256)
        self.register_buffer("digest", torch.frombuffer(bytearray(sha256), dtype=torch.uint8))
        self._probabilities = False
        self._autograd: tuple[TorchGraph | None] | None = None
        self._probabilities = probe(self, image_size, n_classes, str(file)).probabilities
        if self._probabilities:
            self.adapted.append(PROBABILITIES)
        self.tolerance = _tolerance(model, self._takes.dtype)
        self._shapes_name_batch = False
        if self._takes.batch:
            self._free_batch()

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            return _Differentiable.apply(images, self)
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

    def graph(self) -> ir.Model:
        """images (B, 3, H, W) in [0, 1] -> logits (B, C), with the adaptations as operators."""
        model, takes, side = _load(self.file), self._takes, self.image_size
        if self._shapes_name_batch:
            free_batch(model, takes.batch)
        graph = model.graph
        (given,), (logits,) = _inputs(graph), graph.outputs
        for value in values(model):
            if value.name in ("images", "logits"):
                value.name = f"mlvgm/own/{value.name}"
            if value.producer():
                value.shape = None  # it may be that of the fixed batch
        add = Writer(graph).node
        images = x = ir.val("images", ir.DataType.FLOAT, ("B", 3, side, side))
        if takes.side != side:
            rows = _resampling(side, takes.side)
            x = add("MatMul", add("MatMul", rows, x), rows.T)
        if self._mean.any():
            x = add("Sub", x, self._mean.numpy())
        if (self._std != 1).any():
            x = add("Div", x, self._std.numpy())
        if takes.dtype == "uint8":
            x = add("Min", add("Max", add("Floor", add("Add", x, 0.5)), 0.0), 255.0)
        if takes.channels_last:
            x = add("Transpose", x, perm=[0, 2, 3, 1])
        if takes.dtype != "float32":
            x = add("Cast", x, to=given.dtype)
        ir.convenience.replace_all_uses_with(given, x)
        if logits.dtype != ir.DataType.FLOAT:
            logits = add("Cast", logits, to=ir.DataType.FLOAT)
        if self._probabilities:
            logits = add("Log", add("Max", logits, SMALLEST))
        logits = declare(logits, "logits", ir.DataType.FLOAT, ("B", self.n_classes))
        graph.inputs[:], graph.outputs[:] = [images], [logits]
        graph.sort()
        model.ir_version = max(model.ir_version or 0, 4)  # before, weights had to be inputs too
        return model

    def vjp(self, images: Tensor, gradient: Tensor) -> Tensor:
        """Vector-Jacobian product: ``gradient`` (B, C) with respect to the logits -> (B, 3, H, W) to ``images``.

        Exact if `export.onnx_autograd` has all operators of the graph, otherwise estimated from logits.
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
            module = TorchGraph(self.graph().graph)
            found, expected = module(images), self(images)
            error = float((found - expected).norm() / expected.norm())
            if error <= max(10 * LIMITS["fp32"], self.tolerance):
                return module
            reason = f"in PyTorch its logits differ by {error:.0e}"
        except Exception as error:  # an unknown graph can make PyTorch raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
        logger.warning("%s: gradients are estimated, which is slow and makes attacks weaker (%s)", self.file, reason)
        return None

    def _free_batch(self) -> None:
        """Make the fixed batch dynamic, and check that the logits stay the same at every batch size.

        Raises:
            ClassifierError: they do not.
        """
        images = torch.rand(3, 3, self.image_size, self.image_size, generator=torch.Generator().manual_seed(1))
        expected = self(images).numpy()
        for self._shapes_name_batch in (False, True):
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
            f"{self.file}: takes a fixed batch of {self._takes.batch}, which cannot be made dynamic: export it with a "
            "dynamic batch axis"
        )

    def _run(self, array: NDArray[Any], rows: int) -> FloatArray:
        missing = rows - len(array)
        padded = np.concatenate([array, array[:1].repeat(missing, axis=0)]) if missing else array
        try:
            outputs: FloatArray = self._session.run(None, {self._takes.input: padded})[0]
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ClassifierError(f"{self.file}: ONNX Runtime cannot run it ({first_line(error)})") from None
        return outputs[: len(array)]


class _Differentiable(torch.autograd.Function):
    """The logits of an `OnnxClassifier`, differentiable by its ``vjp``."""

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
    """A gradient estimated from differences along random directions (Ilyas et al., ICML 2018, section 2)."""
    total, generator = torch.zeros_like(images), torch.Generator().manual_seed(0)
    for _ in range(_DIRECTIONS):
        step = _STEP * torch.randn(images.shape, generator=generator)
        change = ((classify(images + step) - classify(images - step)) * gradient).sum(dim=1)
        total += change.view(-1, 1, 1, 1) * step / (2 * _STEP**2 * _DIRECTIONS)
    return total


@dataclass(frozen=True)
class _Signature:
    """The input of a classifier.

    Attributes:
        input: its name in the graph.
        dtype: numpy's name of its element type.
        channels_last: whether it is (B, H, W, 3).
        side: height and width in pixels.
        batch: its fixed batch size; 0 for a dynamic one.
    """

    input: str
    dtype: str
    channels_last: bool
    side: int
    batch: int

    @classmethod
    def of(cls, graph: ir.Graph, file: Path, image_size: int, n_classes: int) -> "_Signature":
        inputs, outputs = _inputs(graph), list(graph.outputs)
        if len(inputs) != 1 or len(outputs) != 1:
            raise ClassifierError(
                f"{file}: has {len(inputs)} inputs and {len(outputs)} outputs; it must have one of each"
            )
        (given, shape), (result, gives) = (_type_of(value) for value in (inputs[0], outputs[0]))
        if given not in _IMAGES:
            raise ClassifierError(f"{file}: its input {inputs[0].name!r} is {_name(given)}, not float32 or uint8")
        if result not in _LOGITS:
            raise ClassifierError(f"{file}: its output {outputs[0].name!r} is {_name(result)}, not float32 logits")
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
        return cls(inputs[0].name or "", given.numpy().name, channels_last, side, shape[0] or 0)

    def differences(self, image_size: int) -> list[str]:
        """How it differs from float32 (B, 3, H, W) of the purifier's size; see `OnnxClassifier.adapted`."""
        found = {
            f"takes {self.side} px: images of {image_size} px are resized, bilinearly": self.side != image_size,
            "takes channels last": self.channels_last,
            f"takes {self.dtype}": self.dtype != "float32",
            f"takes a fixed batch of {self.batch}, which is made dynamic": self.batch > 0,
        }
        return [words for words, holds in found.items() if holds]


def _inputs(graph: ir.Graph) -> list[ir.Value]:
    """The inputs without the weights, which old exporters listed among them."""
    return [value for value in graph.inputs if value.name not in graph.initializers]


def _load(file: Path) -> ir.Model:
    try:
        kind = kind_of(file)
    except OSError as error:
        raise ClassifierError(f"{file}: cannot be read ({error.strerror})") from None
    if kind:
        raise ClassifierError(f"{file}: is {kind}: not a valid ONNX file")
    try:
        return load_graph(file)
    except Exception as error:  # onnx raises whatever protobuf raises
        raise ClassifierError(f"{file}: not a valid ONNX file ({first_line(error)})") from None


def _tolerance(model: ir.Model, dtype: str) -> float:
    operators = {node.op_type for node in nodes(model)}
    if dtype == "uint8" or any(name.startswith("QLinear") or name in _ROUNDING for name in operators):
        return ROUNDED
    weights = {weight.dtype for graph in model.graphs() for weight in graph.initializers.values()}
    return LIMITS["fp16"] if dtype == "float16" or ir.DataType.FLOAT16 in weights else 0.0


def _session(path: str, name: str) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ClassifierError(f"{name}: ONNX Runtime cannot run it ({first_line(error)})") from None


def _type_of(value: ir.Value) -> tuple[ir.DataType | None, list[int | None] | None]:
    """Element type (None for what is no tensor) and shape (None if unknown, with None for each dynamic size)."""
    if not isinstance(value.type, ir.TensorType):
        return None, None
    return value.dtype, None if value.shape is None else [n if isinstance(n, int) and n else None for n in value.shape]


def _name(kind: ir.DataType | None) -> str:
    return kind.name.lower() if kind else "no tensor"


def _resampling(size: int, to: int) -> FloatArray:
    """(to, size): bilinear resampling of a row of pixels as a matrix, antialiased where it shrinks the row."""
    return F.interpolate(torch.eye(size)[None, None], (to, size), mode="bilinear", antialias=True)[0, 0].numpy()
