"""The whole pipeline as one ONNX graph, for servers that run a graph and no Python: images in, labels out.

It is made of the graphs of a bundle's stages: encode once, K samples of each image, classify them and the images as
they came. What `handlers.result` computes of the logits follows in the graph. Noise is drawn in it, so by the
runtime's own generator, which may be weaker than the one of `handlers.noise`. The same graph with the noise as
inputs lies beside it and shares its weights: with that one an answer can be repeated, and is compared.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx.version_converter
import onnx_ir as ir

from export.compare import relative_error
from export.onnx_graph import Writer, declare, load_graph, values
from export.precision import LIMITS
from handlers import runtimes
from handlers.errors import MlvgmError
from handlers.inputs import PipelineInputs
from handlers.manifest import Manifest, StageSpec
from handlers.pipeline import Pipeline
from handlers.plan import Plan, is_noise
from mlvgm.files import scratch

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
    with scratch(bundle.resolve().parent) as work:
        draft = work / FOLDER
        draft.mkdir()
        progress(f"joining {', '.join(stage.name for stage in manifest.stages)} with {samples} samples of each image")
        _write(manifest, bundle, draft, samples, images)
        manifest.report[REPORT] = {"samples": samples, "images": images, **_compared(bundle, draft, samples, images)}
        shutil.rmtree(bundle / FOLDER, ignore_errors=True)
        draft.rename(bundle / FOLDER)
    return manifest.write(bundle)


def _write(manifest: Manifest, bundle: Path, folder: Path, samples: int, images: ImageType) -> None:
    files = [bundle / stage.file for stage in manifest.stages]
    stages = [load_graph(file) for file in files]
    opset = max(_OPSET, *(stage.opset_imports.get("", 0) for stage in stages))
    for i, stage in enumerate(stages):
        if stage.opset_imports.get("", 0) < opset:  # a classifier that came as a graph
            converted = onnx.version_converter.convert_version(onnx.load(str(files[i])), opset)
            stages[i] = ir.from_proto(converted)
    _share_weights(stages, folder / f"{GRAPH}.data")
    for name, drawn in ((GRAPH, True), (REPLAY, False)):
        builder = _Builder(manifest, [stage.clone() for stage in stages], samples, images, drawn)
        ir.save(builder.model(), folder / name)
        try:
            onnx.checker.check_model(str(folder / name))
        except onnx.checker.ValidationError as error:
            raise SingleGraphError(f"{bundle}: its stages do not make one graph: {error}") from error


def _share_weights(models: Sequence[ir.Model], data: Path) -> None:
    """Move the weights of all ``models`` to the file ``data``.

    Small ones stay in the graphs: shapes and axes must be known before anything is loaded.
    """
    weights = [weight for model in models for weight in model.graph.initializers.values()]
    large = {w: w.const_value for w in weights if w.const_value is not None and w.const_value.nbytes > _SMALL}
    if large:
        moved = ir.external_data.convert_tensors_to_external([*large.values()], data.parent, data.name)
        for weight, tensor in zip(large, moved, strict=True):
            weight.const_value = tensor


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
    with closing(runtimes.load(runtime, file, runtimes.EngineOptions(precision=manifest.precision))) as engine:
        return {name: np.asarray(output) for name, output in engine.run(feeds).items()}


class _Builder:
    """Puts the graph together, node by node; the names of what comes from a stage begin with the stage's."""

    def __init__(
        self, manifest: Manifest, stages: Sequence[ir.Model], samples: int, images: ImageType, drawn: bool
    ) -> None:
        self.manifest, self.samples, self.images, self.drawn = manifest, samples, images, drawn
        self.stages = {spec.name: stage for spec, stage in zip(manifest.stages, stages, strict=True)}
        self.graph = ir.Graph([], [], nodes=(), opset_imports=_opsets(stages), name=manifest.name)
        writer = Writer(self.graph)
        self.node, self.weight = writer.node, writer.weight

    def model(self) -> ir.Model:
        height, width = self.manifest.image_size
        n_classes, k = len(self.manifest.classes), self.samples
        if self.images == "uint8":
            given = self.input("images", ir.DataType.UINT8, ("B", height, width, 3))
            turned = self.node("Transpose", self.node("Cast", given, to=ir.DataType.FLOAT), perm=[0, 3, 1, 2])
            pixels = self.node("Div", turned, 255.0)
        else:
            pixels = self.input("images", ir.DataType.FLOAT, ("B", 3, height, width))
        purified = self.purify(pixels)
        both = self.node("Concat", pixels, purified, axis=0)
        logits = self.stage(self.manifest.stages[-1], {"images": both})["logits"]
        count = self.rows_of(pixels)
        image_logits = self.node("Slice", logits, [0], count)
        sample_logits = self.node("Slice", logits, count, [np.iinfo(np.int64).max])
        self.add_results(image_logits, self.node("Reshape", sample_logits, [-1, k, n_classes]))
        purified = self.node("Reshape", purified, [-1, k, 3, height, width])
        self.output(purified, "purified", ir.DataType.FLOAT, k, 3, height, width)
        models = self.stages.values()
        functions = [function for model in models for function in model.functions.values()]
        return ir.Model(self.graph, ir_version=max(model.ir_version for model in models), functions=functions)

    def purify(self, pixels: ir.Value) -> ir.Value:
        """K purified rows of each image, (B * K, 3, H, W)."""
        alphas = np.asarray(self.manifest.alphas[self.manifest.default_alphas], np.float32)
        plan = Plan.of(self.manifest.stages[:-1], alphas)
        known = {"images": pixels, "alphas": self.weight(alphas)}
        for stage in plan.per_image:
            for tensor in stage.inputs:
                if is_noise(tensor.name):  # multiplied by 0
                    shape = self.node("Concat", self.rows_of(pixels), tensor.shape[1:], axis=0)
                    known[tensor.name] = self.node("ConstantOfShape", shape)
            known |= self.stage(stage, known)
        known |= self.noise(
            {t.name: t.shape[1:] for stage in plan.per_sample for t in stage.inputs if is_noise(t.name)}, pixels
        )
        repeated: set[str] = {"alphas"}
        for stage in plan.per_sample:
            for tensor in stage.inputs:
                if not is_noise(tensor.name) and tensor.name not in repeated:
                    known[tensor.name] = self.repeat(known[tensor.name], tensor.shape)
                repeated.add(tensor.name)
            known |= self.stage(stage, known)
            repeated |= {tensor.name for tensor in stage.outputs}
        return known["images"]

    def noise(self, shapes: dict[str, Any], pixels: ir.Value) -> dict[str, ir.Value]:
        """All that is called so, (B * K, *shape): of inputs (B, K, *shape), or drawn."""
        if not self.drawn:
            given = {name: self.input(name, ir.DataType.FLOAT, ("B", self.samples, *shapes[name])) for name in shapes}
            return {name: self.node("Reshape", given[name], [-1, *shape]) for name, shape in shapes.items()}
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        normal, drawn, start = self.normal(pixels, sum(sizes)), {}, 0
        for (name, shape), size in zip(shapes.items(), sizes, strict=True):
            drawn[name] = self.node("Reshape", self.columns(normal, start, start + size), [-1, *shape])
            start += size
        return drawn

    def normal(self, pixels: ir.Value, size: int) -> ir.Value:
        """Standard-normal numbers (B * K, ``size`` or more), by Box and Muller.

        Of one uniform draw, for OpenVINO gives two nodes the same numbers. So its RandomNormal, which has two such, is
        skewed, and two latents would get the same noise.
        """
        half = -(-size // 2)
        rows = self.node("Mul", self.rows_of(pixels), [self.samples])
        shape = self.node("Concat", rows, [2 * half], axis=0)
        uniform = self.node("RandomUniformLike", self.node("ConstantOfShape", shape))
        above_zero = self.node("Sub", 1.0, self.columns(uniform, 0, half))
        radius = self.node("Sqrt", self.node("Mul", self.node("Log", above_zero), -2.0))
        angle = self.node("Mul", self.columns(uniform, half, 2 * half), 2 * np.pi)
        both = (self.node("Mul", radius, self.node(part, angle)) for part in ("Cos", "Sin"))
        return self.node("Concat", *both, axis=1)

    def columns(self, value: ir.Value, start: int, stop: int) -> ir.Value:
        return self.node("Slice", value, [start], [stop], [1])

    def repeat(self, value: ir.Value, shape: Sequence[int | str]) -> ir.Value:
        """Every row K times."""
        tiled = self.node("Tile", self.node("Unsqueeze", value, [1]), [1, self.samples, *[1] * (len(shape) - 1)])
        return self.node("Reshape", tiled, [-1, *shape[1:]])

    def stage(self, spec: StageSpec, known: dict[str, ir.Value]) -> dict[str, ir.Value]:
        """Move the nodes and weights of a stage's graph here, where it gets what is ``known``; its outputs by name."""
        stage = self.stages[spec.name]
        given, made = list(stage.graph.inputs), {value.name or "": value for value in stage.graph.outputs}
        for value in given:
            ir.convenience.replace_all_uses_with(value, known[value.name or ""])
        for value in values(stage):
            value.name = f"{spec.name}/{value.name}"
            if value.producer():
                value.shape = None  # "B" is the number of images here
        for i, node in enumerate(stage.graph):
            node.name = f"{spec.name}/{i}"
        while stage.graph.initializers:
            self.graph.register_initializer(stage.graph.initializers.popitem()[1])
        nodes = list(stage.graph)
        stage.graph.outputs.clear()
        stage.graph.remove(nodes)
        self.graph.extend(nodes)
        return made

    def add_results(self, image_logits: ir.Value, sample_logits: ir.Value) -> None:
        """The outputs of `handlers.result.Result`, of the logits (B, C) of the images and (B, K, C) of the samples."""
        n_classes = len(self.manifest.classes)
        mean = self.node("ReduceMean", sample_logits, [1], keepdims=0)
        choices = self.node("ArgMax", sample_logits, axis=2, keepdims=1)
        chosen = self.node("Equal", choices, np.arange(n_classes))
        votes = self.node("ReduceSum", self.node("Cast", chosen, to=ir.DataType.INT64), [1], keepdims=0)
        most_votes = self.node("ReduceMax", votes, [-1], keepdims=1)
        # Equal votes are ordered by the mean logits.
        lowest = np.finfo(np.float32).min
        leaders = self.node("Where", self.node("Equal", votes, most_votes), mean, lowest)
        label = self.node("ArgMax", leaders, axis=1, keepdims=0)
        winning_votes = self.node("Cast", self.node("Squeeze", most_votes, [-1]), to=ir.DataType.FLOAT)
        agreement = self.node("Div", winning_votes, float(self.samples))
        shares = self.node("ReduceMean", self.node("Softmax", sample_logits, axis=2), [1], keepdims=0)
        image_label = self.node("ArgMax", image_logits, axis=1, keepdims=1)
        kept_log = self.node("GatherElements", shares, image_label, axis=1)
        kept_log = self.node("Log", self.node("Max", kept_log, np.finfo(np.float32).tiny))
        log_before = self.node("ReduceMax", self.node("LogSoftmax", image_logits, axis=1), [-1], keepdims=1)
        surest = self.node("ReduceMax", shares, [-1], keepdims=1)
        drop = self.node("Max", self.node("Mul", self.node("Sub", log_before, kept_log), surest), 0.0)
        other_logits = self.node("Where", self.node("Equal", image_label, np.arange(n_classes)), lowest, image_logits)
        highest = (self.node("ReduceMax", logits, [-1], keepdims=1) for logits in (other_logits, image_logits))
        ratio = self.node("Exp", self.node("Sub", *highest))
        score = self.node("Squeeze", self.node("Add", drop, ratio), [-1])
        self.output(label, "label", ir.DataType.INT64)
        self.output(votes, "votes", ir.DataType.INT64, n_classes)
        self.output(mean, "mean_logits", ir.DataType.FLOAT, n_classes)
        self.output(agreement, "agreement", ir.DataType.FLOAT)
        self.output(score, "score", ir.DataType.FLOAT)

    def rows_of(self, value: ir.Value) -> ir.Value:
        return self.node("Shape", value, start=0, end=1)

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        self.graph.inputs.append(ir.val(name, dtype, shape))
        return self.graph.inputs[-1]

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, *sizes: int) -> None:
        """An output with ``sizes`` behind the batch axis."""
        self.graph.outputs.append(declare(value, name, dtype, ("B", *sizes)))


def _opsets(stages: Sequence[ir.Model]) -> dict[str, int]:
    """Those of all stages by domain, which one graph can have in one version only.

    Raises:
        SingleGraphError: two stages have different ones.
    """
    versions: dict[str, int] = {}
    for stage in stages:
        for domain, version in stage.opset_imports.items():
            if versions.setdefault(domain, version) != version:
                both = f"{versions[domain]} and {version}"
                raise SingleGraphError(f"the stages' graphs are of opsets {both}, which cannot be joined")
    return versions
