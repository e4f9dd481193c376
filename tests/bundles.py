"""Tiny bundles, built from hand-made ONNX graphs: every stage is real, every answer takes microseconds."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from handlers.manifest import Batch, Manifest, Samples, StageSpec, TensorSpec

SIZE = 8
BATCH = Batch(1, 4, 8)
CLASSES = ("stop", "yield", "speed limit \N{DEGREE SIGN}")
IMAGES = TensorSpec("images", ("B", 3, SIZE, SIZE))
LOGITS = TensorSpec("logits", ("B", len(CLASSES)))

Floats = npt.NDArray[np.float32]


def write_nvae(folder: Path, nan_on_white: bool = False, batch: Batch = BATCH, **changes: object) -> Manifest:
    """A bundle of the NVAE kind: two latents of different shapes, resampled inside ``decode``.

    With ``nan_on_white`` the encoder gives NaN for a purely white image, and is otherwise unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = ((2, 2, 2), (2, 4, 4))
    features = tuple(TensorSpec(f"feature_{i}", ("B", *shape)) for i, shape in enumerate(shapes))
    noise = tuple(TensorSpec(f"noise_{i}", ("B", *shape)) for i, shape in enumerate(shapes))
    alphas = TensorSpec("alphas", (2,))
    random = np.random.default_rng(0)

    encode = [
        helper.make_node("Conv", ["images", "w0"], ["f0"], strides=[4, 4]),
        helper.make_node("Conv", ["images", "w1"], ["feature_1"], strides=[2, 2]),
    ]
    if nan_on_white:
        encode += [
            helper.make_node("ReduceMin", ["images"], ["darkest"], keepdims=0, axes=[1, 2, 3]),
            helper.make_node("Sub", ["one", "darkest"], ["gap"]),
            helper.make_node("Div", ["one", "gap"], ["inverse"]),
            helper.make_node("Mul", ["inverse", "zero"], ["poison"]),
            helper.make_node("Reshape", ["poison", "column"], ["poison4"]),
            helper.make_node("Add", ["f0", "poison4"], ["feature_0"]),
        ]
    else:
        encode += [helper.make_node("Identity", ["f0"], ["feature_0"])]
    weights = {
        "w0": _weights(random, 2, 3, 4, 4),
        "w1": _weights(random, 2, 3, 2, 2),
        "one": np.float32(1.0),
        "zero": np.float32(0.0),
        "column": np.array([-1, 1, 1, 1]),
    }
    stages = [_save(folder, "encode", encode, (IMAGES,), features, weights)]

    decode = []
    for i in range(2):
        decode += [
            helper.make_node("Gather", ["alphas", f"i{i}"], [f"a{i}"]),
            helper.make_node("Sub", ["one", f"a{i}"], [f"b{i}"]),
            helper.make_node("Mul", [f"feature_{i}", f"b{i}"], [f"kept{i}"]),
            helper.make_node("Mul", [f"noise_{i}", f"a{i}"], [f"drawn{i}"]),
            helper.make_node("Add", [f"kept{i}", f"drawn{i}"], [f"z{i}"]),
            helper.make_node("ConvTranspose", [f"z{i}", f"w{i}"], [f"x{i}"], strides=[4 >> i, 4 >> i]),
        ]
    decode += [helper.make_node("Add", ["x0", "x1"], ["x"]), helper.make_node("Sigmoid", ["x"], ["images"])]
    weights = {
        "w0": _weights(random, 2, 3, 4, 4),
        "w1": _weights(random, 2, 3, 2, 2),
        "one": np.float32(1.0),
        "i0": np.array(0),
        "i1": np.array(1),
    }
    stages += [
        _save(folder, "decode", decode, (*features, *noise, alphas), (IMAGES,), weights),
        _classifier(folder, random),
    ]
    schedules = {"linear": (0.5, 1.0), "none": (0.0, 0.0)}
    return _manifest("tiny", "nvae", shapes, schedules, stages, batch, **changes).write(folder)


def write_half(folder: Path, fp32_holds: bool = True) -> Manifest:
    """A bundle that says it is in half precision: its encoder gives NaN for a white image, its fallback does not.

    Without ``fp32_holds`` the fallback does so too.
    """
    write_nvae(folder, nan_on_white=not fp32_holds)
    (folder / "encode.onnx").rename(folder / "encode.fp32.onnx")
    manifest = write_nvae(folder, nan_on_white=True, precision="fp16")
    encode, *others = manifest.stages
    stages = (dataclasses.replace(encode, fallback="encode.fp32.onnx"), *others)
    return dataclasses.replace(manifest, stages=stages).write(folder)


def write_stylegan(folder: Path, input_noise_l2: float = 0.0, batch: Batch = BATCH, **changes: object) -> Manifest:
    """A bundle of the StyleGAN2 kind: three latents of equal shape and a ``resample`` stage of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    n, width = 3, 4
    codes = TensorSpec("codes", ("B", n, width))
    noise = TensorSpec("noise", ("B", n, width))
    mixed = TensorSpec("mixed", ("B", n, width))
    alphas = TensorSpec("alphas", (n,))
    random = np.random.default_rng(1)

    encode, inputs, source = [], (IMAGES,), "images"
    if input_noise_l2:
        inputs, source = (IMAGES, TensorSpec("input_noise", IMAGES.shape)), "noisy"
        encode += [
            helper.make_node("ReduceL2", ["input_noise"], ["norm"], axes=[1, 2, 3], keepdims=1),
            helper.make_node("Div", ["input_noise", "norm"], ["direction"]),
            helper.make_node("Mul", ["direction", "l2"], ["added"]),
            helper.make_node("Add", ["images", "added"], ["noisy"]),
        ]
    encode += [
        helper.make_node("Flatten", [source], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["code"]),
        helper.make_node("Reshape", ["code", "shape"], ["codes"]),
    ]
    weights = {
        "w": _weights(random, 3 * SIZE * SIZE, n * width),
        "shape": np.array([-1, n, width]),
        "l2": np.float32(input_noise_l2),
    }
    stages = [_save(folder, "encode", encode, inputs, (codes,), weights)]

    resample = [
        helper.make_node("MatMul", ["noise", "w"], ["mapped"]),
        helper.make_node("Tanh", ["mapped"], ["prior"]),
        helper.make_node("Reshape", ["alphas", "shape"], ["a"]),
        helper.make_node("Sub", ["one", "a"], ["b"]),
        helper.make_node("Mul", ["codes", "b"], ["kept"]),
        helper.make_node("Mul", ["prior", "a"], ["drawn"]),
        helper.make_node("Add", ["kept", "drawn"], ["mixed"]),
    ]
    weights = {"w": _weights(random, width, width), "shape": np.array([1, n, 1]), "one": np.float32(1.0)}
    stages += [_save(folder, "resample", resample, (codes, noise, alphas), (mixed,), weights)]

    decode = [
        helper.make_node("Flatten", ["mixed"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["x"]),
        helper.make_node("Sigmoid", ["x"], ["y"]),
        helper.make_node("Reshape", ["y", "shape"], ["images"]),
    ]
    weights = {"w": _weights(random, n * width, 3 * SIZE * SIZE), "shape": np.array([-1, 3, SIZE, SIZE])}
    stages += [_save(folder, "decode", decode, (mixed,), (IMAGES,), weights), _classifier(folder, random)]
    schedules = {"cosine": (0.25, 0.75, 1.0)}
    changes = {"input_noise_l2": input_noise_l2, **changes}
    return _manifest("tiny-style", "e4e", ((width,),) * n, schedules, stages, batch, **changes).write(folder)


def write_plain(folder: Path, weights: Floats, batch: Batch = BATCH) -> Manifest:
    """A bundle that changes no image, and whose logits are the ``weights`` (3 * SIZE * SIZE, 3) times image - 0.5."""
    folder.mkdir(parents=True, exist_ok=True)
    feature = TensorSpec("feature_0", IMAGES.shape)
    noise, alphas = TensorSpec("noise_0", ("B", 1)), TensorSpec("alphas", (1,))
    encode = [helper.make_node("Identity", ["images"], ["feature_0"])]
    decode = [helper.make_node("Identity", ["feature_0"], ["images"])]
    stages = [
        _save(folder, "encode", encode, (IMAGES,), (feature,), {}),
        _save(folder, "decode", decode, (feature, noise, alphas), (IMAGES,), {}),
        _linear(folder, weights),
    ]
    return _manifest("plain", "nvae", ((1,),), {"all": (1.0,)}, stages, batch).write(folder)


def images(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Random pictures, (count, SIZE, SIZE, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def _manifest(
    name: str,
    family: str,
    shapes: tuple[tuple[int, ...], ...],
    alphas: dict[str, tuple[float, ...]],
    stages: Sequence[StageSpec],
    batch: Batch,
    **changes: object,
) -> Manifest:
    fields = {
        "name": name,
        "version": "1.0",
        "family": family,
        "image_size": (SIZE, SIZE),
        "noise_shapes": shapes,
        "alphas": alphas,
        "default_alphas": next(iter(alphas)),
        "samples": Samples(5, 16),
        "classes": CLASSES,
        "batch": batch,
        "stages": tuple(stages),
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


def _classifier(folder: Path, random: np.random.Generator) -> StageSpec:
    return _linear(folder, _weights(random, 3 * SIZE * SIZE, len(CLASSES)))


def _linear(folder: Path, weights: Floats) -> StageSpec:
    """A linear classifier that centres its input; its weights lie in an external data file."""
    nodes = [
        helper.make_node("Sub", ["images", "half"], ["centred"]),
        helper.make_node("Flatten", ["centred"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    constants = {"half": np.float32(0.5), "w": weights}
    return _save(folder, "classify", nodes, (IMAGES,), (LOGITS,), constants, external=True)


def _weights(random: np.random.Generator, *shape: int) -> Floats:
    return random.standard_normal(shape, np.float32)


def _save(
    folder: Path,
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    weights: Mapping[str, npt.ArrayLike],
    external: bool = False,
) -> StageSpec:
    used = {entry for node in nodes for entry in node.input}
    graph = helper.make_graph(
        nodes,
        name,
        [_info(tensor) for tensor in inputs],
        [_info(tensor) for tensor in outputs],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in weights.items() if key in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    file = f"{name}.onnx"
    onnx.save(model, folder / file, save_as_external_data=external, location=f"{file}.data", size_threshold=0)
    return StageSpec(name, file, tuple(inputs), tuple(outputs))


def _info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.shape))
