"""Classifiers as ONNX files the way they are found, through export.bundle, and then through both CPU runtimes.

    PYTHONPATH=. python tests/cases/onnx_classifiers.py [--large]

Each file is made here, of drawn weights, and exported with a purifier that is small enough to be traced in seconds. The
bundle's own reading of an image must be that of the file, run alone. --large adds one of more than 2 GB.
"""

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from export.bundle import export_bundle
from handlers.pipeline import Pipeline
from mlvgm.nvae import NVAE, NVAEConfig, NVAEPurifier
from mlvgm.recipe import Batch, ClassifierRecipe, Recipe, Samples

SIDE, CLASSES = 16, 10
OURS = ("mlvgm", "export", "handlers")  # exceptions of these packages are printed as one line
node, drawn, faults = helper.make_node, np.random.default_rng(0), 0
IMAGES = drawn.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
WEIGHTS = {
    "conv": drawn.standard_normal((8, 3, 3, 3), np.float32),
    "head": drawn.standard_normal((8, CLASSES), np.float32),
}
torch.manual_seed(0)
SHAPE = NVAEConfig(SIDE, (1,), 1, 1, 0, channels=2, blocks=1, cells_per_block=1, mixtures=1, expansion=1, kernel=3)
PURIFIER = NVAEPurifier(NVAE(SHAPE)).eval().requires_grad_(False)


def net(
    before=(),
    after=(),
    kind=TensorProto.FLOAT,
    shape=("N", 3, SIDE, SIDE),
    batch="N",
    more=None,
    opset=17,
    ir=8,
    **also,
):
    """x -> ``before``, whose last tensor is "t" -> a small network, whose last tensor is "s" -> ``after`` -> y."""
    last = "s" if after else "y"
    nodes = [
        *before,
        node("Conv", ["t" if before else "x", "conv"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
    ]
    nodes += [
        node("GlobalAveragePool", ["r"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("MatMul", ["f", "head"], [last]),
        *after,
    ]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in (WEIGHTS | (more or {})).items()]
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    if ir == 3:  # as the first exporters wrote it: weights are inputs too
        inputs += [helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in weights]
    graph = helper.make_graph(
        nodes, "net", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, CLASSES])], weights
    )
    domains = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in also.pop("domains", ()))]
    return helper.make_model(graph, opset_imports=domains, ir_version=ir, **also)


def export(content, mean=None, std=None):
    """Folder of the bundle, all that was said, and the file; if it fails, None and the words of the error."""
    folder, said = Path(tempfile.mkdtemp(dir=SCRATCH)), []
    file = content if isinstance(content, Path) else folder / "own.onnx"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif file is not content:
        onnx.save(content, file)
    words = {key: value for key, value in (("mean", mean), ("std", std)) if value}
    small = {"alphas": {"linear": (1.0,) * PURIFIER.n_latents}, "batch": Batch(1, 2, 2), "samples": Samples(2, 2)}
    own = ClassifierRecipe("onnx", **words)
    recipe = Recipe("own", "nvae", SIDE, PURIFIER.n_latents, own, tuple("abcdefghij"), **small)
    aside = io.StringIO()
    try:
        to_us = contextlib.redirect_stderr(aside), contextlib.redirect_stdout(aside)
        with warnings.catch_warnings(record=True) as warned, to_us[0], to_us[1]:
            manifest = export_bundle(recipe, PURIFIER, file, folder / "bundle", progress=said.append)
    except Exception as error:
        clean = type(error).__module__.partition(".")[0] in OURS
        words = str(error).replace(str(folder), "")
        return None, words if clean else f"a traceback: {type(error).__name__}: {words}", file
    said += [aside.getvalue(), *(str(each.message) for each in warned), str(manifest.report)]
    return folder / "bundle", " ".join(said), file


def reading(bundle: Path, runtime: str) -> np.ndarray | str:
    try:
        with Pipeline.load(bundle, runtime, threads=1) as pipeline:
            return pipeline.run(IMAGES, seeds=[1, 2]).unpurified_confidences
    except Exception as error:
        return f"{runtime}: {type(error).__name__}: {error}"


def alone(file: Path, mean=None, std=None) -> np.ndarray:
    images = (
        IMAGES.transpose(0, 3, 1, 2).astype(np.float32) / 255 - np.reshape(mean or (0,) * 3, (3, 1, 1))
    ) / np.reshape(std or (1,) * 3, (3, 1, 1))
    (logits,) = onnxruntime.InferenceSession(str(file)).run(None, {"x": images.astype(np.float32)})
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def say(name: str, good: bool, wanted: str, got: str) -> None:
    global faults
    faults += not good
    print(f"ok    {name}" if good else f"FAULT {name}: wanted {wanted}, got {' '.join(got.split())[:170]}", flush=True)


def served(name: str, content, runtimes=("onnxruntime", "openvino"), or_said: str = "", **normalisation) -> None:
    """Exported, and read alike by ``runtimes``; or an error or a warning of the export that has ``or_said``."""
    bundle, said, file = export(content, **normalisation)
    wanted = f"answers of {' and '.join(runtimes)}" + (f", or an export that says {or_said!r}" if or_said else "")
    if or_said and or_said in said.lower() and not said.startswith("a traceback"):
        return say(name, True, wanted, said)
    if bundle is None:
        return say(name, False, wanted, said)
    for runtime in runtimes:
        found = reading(bundle, runtime)
        if isinstance(found, str) or np.abs(found - alone(file, **normalisation)).max() > 1e-3:
            return say(
                name,
                False,
                wanted,
                found if isinstance(found, str) else f"{runtime}: another answer than the file alone",
            )
    return say(name, True, wanted, said)


def refused(name: str, content, *words: str, **normalisation) -> None:
    bundle, said, _ = export(content, **normalisation)
    good = bundle is None and not said.startswith("a traceback") and any(word in said.lower() for word in words)
    say(name, good, f"one line that says {' or '.join(words)}", said if bundle is None else "a bundle")


def in_integers(model) -> bytes:
    class Reader(CalibrationDataReader):
        left = [{"x": drawn.random((4, 3, SIDE, SIDE), np.float32)} for _ in range(2)]  # noqa: RUF012

        def get_next(self):
            return self.left.pop() if self.left else None

    source, target = SCRATCH / "float.onnx", SCRATCH / "int8.onnx"
    onnx.save(model, source)
    logging.disable(logging.WARNING)  # the quantizer's advice
    quantize_static(source, target, Reader(), quant_format=QuantFormat.QOperator)
    return target.read_bytes()


def large() -> Path:
    """2.05 GiB of zeros in external data, sparse on disk; loading it takes some 8 GB of memory."""
    folder, rows = Path(tempfile.mkdtemp(dir=SCRATCH)), 3 * SIDE * SIDE
    columns = 2_200_000_000 // 4 // rows
    weight = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[rows, columns], data_location=TensorProto.EXTERNAL
    )
    for key, value in {"location": "own.data", "offset": "0", "length": str(4 * rows * columns)}.items():
        weight.external_data.add(key=key, value=value)
    with (folder / "own.data").open("wb") as data:
        data.truncate(4 * rows * columns)
    nodes = [node("Flatten", ["x"], ["f"]), node("MatMul", ["f", "w"], ["m"])]
    nodes += [node("ReduceMax", ["m"], ["r"], axes=[1]), node("Mul", ["r", "row"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])
    row = numpy_helper.from_array(np.ones((1, CLASSES), np.float32), "row")
    model = helper.make_model(
        helper.make_graph(nodes, "net", [x], [y], [weight, row]),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    (folder / "own.onnx").write_bytes(model.SerializeToString())
    return folder / "own.onnx"


with tempfile.TemporaryDirectory() as scratch:
    SCRATCH = Path(scratch)
    served("control: plain, normalised by the recipe", net(), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    served("no mean and no std: it normalises by itself", net())
    served("std alone: it takes 0 to 255", net(), std=(1 / 255,) * 3)
    served("first node Identity", net([node("Identity", ["x"], ["t"])]))
    served("first node Sub 0", net([node("Sub", ["x", "zero"], ["t"])], more={"zero": np.float32(0)}))
    served("IR 3, weights listed as inputs", net(opset=9, ir=3), mean=(0.5,) * 3)

    value = helper.make_tensor_value_info("v", TensorProto.FLOAT, ["N", CLASSES])
    branches = {
        "then_branch": helper.make_graph([node("Relu", ["s"], ["v"])], "then", [], [value]),
        "else_branch": helper.make_graph([node("Add", ["s", "bias"], ["v"])], "else", [], [value]),
    }
    more = {"cond": np.array(False), "bias": np.ones(CLASSES, np.float32)}
    served(
        "If, whose branches use names from outside",
        net(after=[node("If", ["cond"], ["y"], **branches)], more=more),
        mean=(0.5,) * 3,
    )

    # Only one of the runtimes can run these. The export may refuse them, or say so; or "auto" takes the one that can.
    auto = {"runtimes": ("auto", "onnxruntime"), "or_said": "openvino", "mean": (0.5,) * 3}
    served("int8 as QLinearConv and QLinearMatMul", in_integers(net()), **auto)
    twice = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    call = node("Twice", ["s"], ["y"], domain="mine")
    served("a local function", net(after=[call], domains=("mine",), functions=[twice]), **auto)

    # Probabilities in the place of logits: softmax over them makes every confidence nearly the same.
    said = net(after=[node("Softmax", ["s"], ["y"], axis=1)])
    bundle, words, _ = export(said, mean=(0.5,) * 3)
    wanted = "a warning or an error that says softmax or probabilities"
    told = any(word in words.lower() for word in ("softmax", "probabilit")) and not words.startswith("a traceback")
    say("softmax inside", told, wanted, words if bundle is None else "a bundle, without a word")

    adapted = {"or_said": "the classifier is adapted"}
    channels_last = [node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2])]
    served("NHWC", net(channels_last, shape=("N", SIDE, SIDE, 3)), **adapted)
    cast = [node("Cast", ["x"], ["t"], to=TensorProto.FLOAT)]
    served("float16 input", net(cast, kind=TensorProto.FLOAT16), **adapted)
    served("uint8 input", net(cast, kind=TensorProto.UINT8), **adapted)
    served("a fixed batch", net(shape=(1, 3, SIDE, SIDE), batch=1), **adapted)
    served("another size", net(shape=("N", 3, 24, 24)), **adapted)
    averages = [node("ReduceMean", ["s"], ["m"], axes=[0], keepdims=1), node("Sub", ["s", "m"], ["y"])]
    refused(
        "a fixed batch whose rows depend on each other", net(shape=(2, 3, SIDE, SIDE), batch=2, after=averages), "batch"
    )
    refused("sides that differ", net(shape=("N", 3, SIDE, 24)), "shape")
    refused("one channel", net(shape=("N", 1, SIDE, SIDE)), "shape")
    refused("int64 input", net(cast, kind=TensorProto.INT64), "int64")
    refused(
        "an operator that no runtime knows",
        net(after=[node("Foo", ["s"], ["y"], domain="acme")], domains=("acme",)),
        "foo",
    )
    refused(
        "NaN among the weights",
        net(after=[node("Mul", ["s", "nan"], ["y"])], more={"nan": np.float32("nan")}),
        "nan",
        "finite",
    )
    refused("control: a web page", b"<!DOCTYPE html><html><title>Sign in</title></html>", "not a valid onnx")
    refused("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "lfs")
    checkpoint = io.BytesIO()
    torch.save({"head": torch.zeros(2)}, checkpoint)
    refused("a PyTorch checkpoint", checkpoint.getvalue(), "pytorch", "checkpoint")
    if "--large" in sys.argv:
        served("more than 2 GB in external data", large(), ("onnxruntime",), "2 gb")
sys.exit(1 if faults else 0)
