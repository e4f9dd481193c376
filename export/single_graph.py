"""The whole pipeline as one ONNX graph, for servers that run a graph and no Python: images in, labels out.

It is made of the graphs of a bundle's stages: encode once, K samples of each image, classify them and the images as
they came. What `handlers.result` computes of the logits follows in the graph. Noise is drawn in it, so by the
runtime's own generator, which may be weaker than the one of `handlers.noise`. The same graph with the noise as
inputs lies beside it and shares its weights: with that one an answer can be repeated, and is compared.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from io import BufferedWriter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx.version_converter
from onnx import ModelProto, NodeProto, TensorProto, compose, external_data_helper, helper, numpy_helper

from export.compare import relative_error
from export.precision import LIMITS
from handlers import runtimes
from handlers.errors import MlvgmError
from handlers.inputs import PipelineInputs
from handlers.manifest import Manifest, StageSpec
from handlers.pipeline import Pipeline
from handlers.plan import Plan, is_noise

FOLDER, GRAPH, REPLAY = "single", "model.onnx", "replay.onnx"
"""In a bundle: where both graphs and their weights lie, and the two graphs."""

REPORT = "single_graph"
"""Among the reports of a manifest: K as "samples", the type of the images as "images", and the comparison."""

_SMALL = 1024  # bytes of a weight
_OPSET = 18  # from it on, the axes of a reduction are an input

ImageType = Literal["uint8", "float32"]


class SingleGraphError(MlvgmError):
    """A bundle's stages do not make one graph, or it does not compute what the pipeline computes."""


def add_single_graph(
    bundle: str | Path,
    samples: int = 0,
    images: ImageType = "uint8",
    progress: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Write the graph of ``bundle`` into its folder `FOLDER`, compared with the pipeline and listed in the manifest.

    Args:
        samples: K, of each image; 0 for the bundle's default, or its maximum where that is "auto".
        images: "uint8" takes (B, H, W, 3), "float32" takes (B, 3, H, W) in [0, 1].

    Raises:
        BundleError: the bundle is damaged or inconsistent.
        SingleGraphError: the stages do not make one graph, or it differs from the pipeline; nothing is written then.
    """
    bundle = Path(bundle)
    manifest = Manifest.read(bundle)
    default = manifest.samples.default
    samples = samples or (default if isinstance(default, int) else manifest.samples.max)
    if samples > manifest.samples.max:
        raise SingleGraphError(f"{samples} samples are more than the {manifest.samples.max} of the bundle")
    with tempfile.TemporaryDirectory(prefix=".single-", dir=bundle.resolve().parent) as name:
        draft = Path(name) / FOLDER
        draft.mkdir()
        progress(f"joining {', '.join(stage.name for stage in manifest.stages)} with {samples} samples of each image")
        _write(manifest, bundle, draft, samples, images)
        manifest.report[REPORT] = {"samples": samples, "images": images, **_compared(bundle, draft, samples, images)}
        shutil.rmtree(bundle / FOLDER, ignore_errors=True)
        draft.rename(bundle / FOLDER)
    return manifest.write(bundle)


def _write(manifest: Manifest, bundle: Path, folder: Path, samples: int, images: ImageType) -> None:
    data = folder / f"{GRAPH}.data"
    files = [bundle / stage.file for stage in manifest.stages]
    models = [onnx.load(str(file), load_external_data=False) for file in files]
    opset = max(_OPSET, *map(_opset, models))
    with data.open("wb") as weights:
        for i, file in enumerate(files):
            if _opset(models[i]) < opset:  # a classifier that came as a graph
                models[i] = onnx.version_converter.convert_version(onnx.load(str(file)), opset)
            compose.add_prefix(models[i], f"{manifest.stages[i].name}/", inplace=True)
            _externalise(models[i], bundle, weights, data.name)
    if not data.stat().st_size:
        data.unlink()
    for name, drawn in ((GRAPH, True), (REPLAY, False)):
        onnx.save(_Builder(manifest, models, samples, images, drawn).model(), str(folder / name))
        try:
            onnx.checker.check_model(str(folder / name))
        except onnx.checker.ValidationError as error:
            raise SingleGraphError(f"{bundle}: its stages do not make one graph: {error}") from error


def _externalise(model: ModelProto, folder: Path, target: BufferedWriter, location: str) -> None:
    """Move the weights of ``model``, which lies in ``folder``, to the end of ``target``, a file named ``location``.

    Small ones stay in the graph: shapes and axes must be known before anything is loaded.
    """
    for tensor in model.graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
        if len(tensor.raw_data) > _SMALL:
            begun = target.tell()
            external_data_helper.set_external_data(tensor, location, begun, target.write(tensor.raw_data))
            tensor.ClearField("raw_data")


def _compared(bundle: Path, folder: Path, samples: int, images: ImageType) -> dict[str, Any]:
    """The replay graph against the pipeline, in ONNX Runtime: labels, and the relative error of what they come from."""
    with Pipeline.load(bundle, "onnxruntime") as pipeline:
        manifest = pipeline.manifest
        shape = (2, *manifest.image_size, 3)
        pictures = np.random.Generator(np.random.Philox(0)).integers(0, 256, shape, np.uint8)
        expected = pipeline.run(pictures, samples, range(len(pictures)))
    found = replay(manifest, folder / REPLAY, pictures, samples, range(len(pictures)), "onnxruntime", images)
    limit = max(LIMITS[manifest.precision], LIMITS[manifest.weights])
    pairs = (("purified", expected.purified), ("mean_logits", expected.logits))
    worst = {name: float(relative_error(found[name], theirs)) for name, theirs in pairs}
    equal = bool((found["label"] == expected.labels).all() and (found["votes"] == expected.votes).all())
    if not equal or max(worst.values()) > limit:
        raise SingleGraphError(f"{bundle}: the single graph differs from the pipeline: {worst}, equal labels: {equal}")
    errors = [{"output": name, "relative_error": error} for name, error in worst.items()]
    return {"runtime": "onnxruntime", "precision": manifest.precision, "limit": limit, "worst": errors, "equal": equal}


def replay(
    manifest: Manifest,
    file: Path,
    images: npt.ArrayLike,
    samples: int,
    seeds: Sequence[int],
    runtime: str,
    image_type: ImageType = "uint8",
) -> dict[str, npt.NDArray[Any]]:
    """What the replay graph ``file`` gives for the noise that `Pipeline.run` draws with these seeds."""
    inputs = PipelineInputs.of(manifest, images, samples, seeds)
    count = len(inputs.images)
    wanted = Plan.of(manifest.stages[:-1], inputs.alphas).noise
    drawn = inputs.draw(manifest, np.arange(count * samples), wanted)
    feeds: dict[str, Any] = {name: noise.reshape(count, samples, *noise.shape[1:]) for name, noise in drawn.items()}
    feeds["images"] = np.asarray(images) if image_type == "uint8" else inputs.images
    with closing(runtimes.load(runtime, file, runtimes.Options(precision=manifest.precision))) as engine:
        return engine.run(feeds)


class _Builder:
    """Puts the graph together, node by node; a name is a tensor's, those of a stage begin with the stage's."""

    def __init__(
        self, manifest: Manifest, models: Sequence[ModelProto], samples: int, images: ImageType, drawn: bool
    ) -> None:
        self.manifest, self.models, self.samples, self.images, self.drawn = manifest, models, samples, images, drawn
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def model(self) -> ModelProto:
        height, width = self.manifest.image_size
        n_classes, k = len(self.manifest.classes), self.samples
        if self.images == "uint8":
            self.inputs.append(_value("images", TensorProto.UINT8, ("B", height, width, 3)))
            turned = self.node("Transpose", self.node("Cast", "images", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
            pixels = self.node("Div", turned, self.constant(np.float32(255)))
        else:
            self.inputs.append(_value("images", TensorProto.FLOAT, ("B", 3, height, width)))
            pixels = "images"
        purified = self.purify(pixels)
        both = self.node("Concat", pixels, purified, axis=0)
        logits = self.stage(self.manifest.stages[-1], self.models[-1], {"images": both})["logits"]
        count = self.rows_of(pixels)
        before = self.node("Slice", logits, self.constant([0]), count)
        ours = self.node("Slice", logits, count, self.constant([np.iinfo(np.int64).max]))
        ours = self.node("Reshape", ours, self.constant([-1, k, n_classes]))
        self.node("Reshape", purified, self.constant([-1, k, 3, height, width]), out="purified")
        self.judge(before, ours)
        outputs = [
            _value("label", TensorProto.INT64, ("B",)),
            _value("votes", TensorProto.INT64, ("B", n_classes)),
            _value("mean_logits", TensorProto.FLOAT, ("B", n_classes)),
            _value("agreement", TensorProto.FLOAT, ("B",)),
            _value("score", TensorProto.FLOAT, ("B",)),
            _value("purified", TensorProto.FLOAT, ("B", k, 3, height, width)),
        ]
        graph = helper.make_graph(self.nodes, self.manifest.name, self.inputs, outputs, self.weights)
        return helper.make_model(
            graph,
            opset_imports=_opsets(self.models),
            functions=[function for model in self.models for function in model.functions],
            ir_version=max(model.ir_version for model in self.models),
        )

    def purify(self, pixels: str) -> str:
        """K purified rows of each image, (B * K, 3, H, W)."""
        models = {stage.name: model for stage, model in zip(self.manifest.stages, self.models, strict=True)}
        alphas = np.asarray(self.manifest.alphas[self.manifest.default_alphas], np.float32)
        plan = Plan.of(self.manifest.stages[:-1], alphas)
        known = {"images": pixels, "alphas": self.constant(alphas)}
        for stage in plan.per_image:
            for tensor in stage.inputs:
                if is_noise(tensor.name):  # multiplied by 0
                    shape = self.node("Concat", self.rows_of(pixels), self.constant(tensor.shape[1:]), axis=0)
                    known[tensor.name] = self.node("ConstantOfShape", shape)
            known |= self.stage(stage, models[stage.name], known)
        known |= self.noise(
            {t.name: t.shape[1:] for stage in plan.per_sample for t in stage.inputs if is_noise(t.name)}, pixels
        )
        repeated: set[str] = {"alphas"}
        for stage in plan.per_sample:
            for tensor in stage.inputs:
                if not is_noise(tensor.name) and tensor.name not in repeated:
                    known[tensor.name] = self.repeat(known[tensor.name], tensor.shape)
                repeated.add(tensor.name)
            known |= self.stage(stage, models[stage.name], known)
            repeated |= {tensor.name for tensor in stage.outputs}
        return known["images"]

    def noise(self, shapes: dict[str, Any], pixels: str) -> dict[str, str]:
        """All that is called so, (B * K, *shape): of inputs (B, K, *shape), or drawn."""
        if not self.drawn:
            for name, shape in shapes.items():
                self.inputs.append(_value(name, TensorProto.FLOAT, ("B", self.samples, *shape)))
            return {name: self.node("Reshape", name, self.constant([-1, *shape])) for name, shape in shapes.items()}
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        normal, drawn, start = self.normal(pixels, sum(sizes)), {}, 0
        for (name, shape), size in zip(shapes.items(), sizes, strict=True):
            drawn[name] = self.node("Reshape", self.columns(normal, start, start + size), self.constant([-1, *shape]))
            start += size
        return drawn

    def normal(self, pixels: str, size: int) -> str:
        """Standard-normal numbers (B * K, ``size`` or more), by Box and Muller.

        Of one uniform draw, for OpenVINO gives two nodes the same numbers. So its RandomNormal, which has two such, is
        skewed, and two latents would get the same noise.
        """
        half = -(-size // 2)
        rows = self.node("Mul", self.rows_of(pixels), self.constant([self.samples]))
        shape = self.node("Concat", rows, self.constant([2 * half]), axis=0)
        uniform = self.node("RandomUniformLike", self.node("ConstantOfShape", shape))
        above_zero = self.node("Sub", self.constant(np.float32(1)), self.columns(uniform, 0, half))
        radius = self.node("Sqrt", self.node("Mul", self.node("Log", above_zero), self.constant(np.float32(-2))))
        angle = self.node("Mul", self.columns(uniform, half, 2 * half), self.constant(np.float32(2 * np.pi)))
        both = (self.node("Mul", radius, self.node(part, angle)) for part in ("Cos", "Sin"))
        return self.node("Concat", *both, axis=1)

    def columns(self, name: str, start: int, stop: int) -> str:
        return self.node("Slice", name, *(self.constant([at]) for at in (start, stop, 1)))

    def repeat(self, name: str, shape: Sequence[int | str]) -> str:
        """Every row K times."""
        apart = self.node("Unsqueeze", name, self.constant([1]))
        tiled = self.node("Tile", apart, self.constant([1, self.samples, *[1] * (len(shape) - 1)]))
        return self.node("Reshape", tiled, self.constant([-1, *shape[1:]]))

    def stage(self, stage: StageSpec, model: ModelProto, known: dict[str, str]) -> dict[str, str]:
        """The nodes and weights of a stage's graph, all of whose names begin with the stage's; its outputs by name."""
        for tensor in stage.inputs:
            self.node("Identity", known[tensor.name], out=f"{stage.name}/{tensor.name}")
        for i, node in enumerate(model.graph.node):
            node.name = f"{stage.name}/{i}"
        self.nodes += model.graph.node
        self.weights += model.graph.initializer
        return {tensor.name: f"{stage.name}/{tensor.name}" for tensor in stage.outputs}

    def judge(self, before: str, ours: str) -> None:
        """The outputs of `handlers.result.Result`, of the logits (B, C) of the images and (B, K, C) of the samples."""
        last, samples = self.constant([-1]), self.constant([1])
        mean = self.node("ReduceMean", ours, samples, keepdims=0, out="mean_logits")
        choices = self.node("ArgMax", ours, axis=2, keepdims=1)
        chosen = self.node("Equal", choices, self.constant(np.arange(len(self.manifest.classes))))
        votes = self.node(
            "ReduceSum", self.node("Cast", chosen, to=TensorProto.INT64), samples, keepdims=0, out="votes"
        )
        most = self.node("ReduceMax", votes, last, keepdims=1)
        # Equal votes are ordered by the mean logits.
        lowest = self.constant(np.finfo(np.float32).min)
        leaders = self.node("Where", self.node("Equal", votes, most), mean, lowest)
        self.node("ArgMax", leaders, axis=1, keepdims=0, out="label")
        won = self.node("Cast", self.node("Squeeze", most, last), to=TensorProto.FLOAT)
        self.node("Div", won, self.constant(np.float32(self.samples)), out="agreement")
        shares = self.node("ReduceMean", self.node("Softmax", ours, axis=2), samples, keepdims=0)
        label = self.node("ArgMax", before, axis=1, keepdims=1)
        left = self.node("GatherElements", shares, label, axis=1)
        left = self.node("Log", self.node("Max", left, self.constant(np.finfo(np.float32).tiny)))
        had = self.node("ReduceMax", self.node("LogSoftmax", before, axis=1), last, keepdims=1)
        sure = self.node("ReduceMax", shares, last, keepdims=1)
        drop = self.node("Squeeze", self.node("Mul", self.node("Sub", had, left), sure), last)
        drop = self.node("Max", drop, self.constant(np.float32(0)))
        two = self.node("TopK", before, self.constant([2]), axis=1)
        second, first = (self.node(operator, two, last, keepdims=0) for operator in ("ReduceMin", "ReduceMax"))
        gap = self.node("Sub", second, first)
        self.node("Add", drop, self.node("Exp", gap), out="score")

    def rows_of(self, name: str) -> str:
        return self.node("Shape", name, start=0, end=1)

    def node(self, operator: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """Its first output, which is called ``out``, or after the node's place."""
        out = out or f"{operator}_{len(self.nodes)}"
        outputs = [out, f"{out}_places"] if operator == "TopK" else [out]
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, out, **attributes))
        return out

    def constant(self, value: Any) -> str:
        """Whole numbers as int64; numpy's own as they are."""
        array = np.asarray(value)
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name


def _value(name: str, kind: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _opset(model: ModelProto) -> int:
    return next((opset.version for opset in model.opset_import if not opset.domain), 0)


def _opsets(models: Sequence[ModelProto]) -> list[onnx.OperatorSetIdProto]:
    """Those of all stages, which one graph can have in one version only.

    Raises:
        SingleGraphError: two stages have different ones.
    """
    versions: dict[str, int] = {}
    for model in models:
        for opset in model.opset_import:
            if versions.setdefault(opset.domain, opset.version) != opset.version:
                both = f"{versions[opset.domain]} and {opset.version}"
                raise SingleGraphError(f"the stages' graphs are of opsets {both}, which cannot be joined")
    return [helper.make_opsetid(domain, version) for domain, version in versions.items()]
