"""Real engines of every graph of the small models, built without a GPU; and which engine is taken for which graph."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import classifier, families
from export.bundle import export_bundle
from export.engines import tensorrt
from export.engines.tensorrt import HALF_SHARE, BuildError, build, build_bundle, inspected_share
from export.precision import to_fp16
from export.trace import trace
from handlers import runtimes
from handlers.manifest import Batch, Manifest
from handlers.runtimes import EngineError, EngineOptions, RuntimeMissing
from handlers.runtimes.engine_store import digest, find
from handlers.runtimes.tensorrt import load
from mlvgm.resnet import read_resnet50
from tests.export import models
from tests.export.families.test_stylegan2 import purifier
from tests.mlvgm import small

trt = pytest.importorskip("tensorrt_rtx")
BATCH = Batch(1, 2, 4)


def convolution(file: Path, half: bool = True, cast: bool = False) -> Path:
    """A graph of one convolution; with ``cast`` it is fp32 and only a cast aside is half."""
    kind = TensorProto.FLOAT16 if half and not cast else TensorProto.FLOAT
    weight = np.random.default_rng(0).random((4, 3, 3, 3), np.float32)
    weight = weight.astype(np.float16 if kind == TensorProto.FLOAT16 else np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=kind),
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    if cast:
        nodes += [
            helper.make_node("Cast", ["y"], ["h"], to=TensorProto.FLOAT16),
            helper.make_node("Relu", ["h"], ["r"]),
        ]
    nodes.append(helper.make_node("Cast", ["r" if cast else "y"], ["out"], to=TensorProto.FLOAT))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", channels, 8, 8])
        for name, channels in (("images", 3), ("out", 4))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(file))
    return file


@pytest.mark.parametrize(
    ("family", "precision"),
    # NVAE in fp32 is the bundle below.
    [("nvae", "fp16"), *((family, p) for family in ("e4e", "style_transformer") for p in ("fp32", "fp16"))],
)
def test_every_graph_becomes_an_engine_in_its_own_precision(family: str, precision: str, tmp_path: Path) -> None:
    if family == "nvae":
        model, last = models.purifier(), models.classifier()
    else:
        model, last = purifier(family, tmp_path), read_resnet50(small.save(small.resnet(), tmp_path), 3)
    stages = [*families.stages(model, False, 0.0), classifier.stage(last, model.image_size, 3)]
    if family == "style_transformer":  # the others are those of e4e
        stages = [stage for stage in stages if stage.name in ("encode", "decode")]
    for stage in stages:
        file = tmp_path / f"{stage.name}.onnx"
        trace(to_fp16(stage) if precision == "fp16" else stage, file)
        engine = build(file, tmp_path / "engines", BATCH)
        info = json.loads(engine.with_suffix(".json").read_text())
        assert info["targets"] == ["8.6", "8.9", "12.0"]
        assert engine.stat().st_size > 10_000
        if precision == "fp16":
            assert info["half_share"] >= HALF_SHARE
        else:
            assert info["half_share"] is None


def test_an_engine_that_is_there_is_taken_and_every_other_is_built_anew(tmp_path: Path) -> None:
    file, folder = convolution(tmp_path / "decode.onnx"), tmp_path / "engines"
    engine = build(file, folder, BATCH, targets=["8.9"])
    stamp = engine.stat().st_mtime_ns
    assert build(file, folder, BATCH, targets=["8.9"]) == engine
    assert engine.stat().st_mtime_ns == stamp
    others = {build(file, folder, Batch(1, 2, 8), targets=["8.9"]), build(file, folder, BATCH, targets=["8.6"])}
    assert len({engine, *others}) == 3
    good = engine.read_bytes()
    engine.write_bytes(good[:-1] + b"?")  # damaged
    build(file, folder, BATCH, targets=["8.9"])
    assert engine.stat().st_mtime_ns != stamp
    assert engine.read_bytes()[-1:] == good[-1:]
    info = json.loads(engine.with_suffix(".json").read_text())
    stamp = engine.stat().st_mtime_ns
    engine.with_suffix(".json").write_text(json.dumps({**info, "version": "1.0"}))  # of another version
    build(file, folder, BATCH, targets=["8.9"])
    assert engine.stat().st_mtime_ns != stamp
    convolution(file, half=False)  # another graph under the same name
    assert build(file, folder, BATCH, targets=["8.9"]) != engine


def test_an_engine_that_is_fp32_in_disguise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"only 0% of the parsed network's .* are fp16, at least 50% must be"):
        build(convolution(tmp_path / "decode.onnx", cast=True), tmp_path / "engines", BATCH)
    assert not list(tmp_path.glob("engines/*"))


def test_what_cannot_be_built_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(BuildError, match=r"broken\.onnx: tensorrt-rtx cannot parse it"):
        build(tmp_path / "broken.onnx", tmp_path, BATCH)
    with pytest.raises(BuildError, match=r"compute capability 9\.0; it knows .*SM89"):
        build(convolution(tmp_path / "x.onnx"), tmp_path, BATCH, targets=["9.0"])


def test_the_inspector_counts_what_layers_give_by_size() -> None:
    layers = [
        {"Name": "a", "Outputs": [{"Name": "x", "Dimensions": [2, 3], "Format/Datatype": "Half NHWC8"}]},
        {"Name": "b", "Outputs": [{"Name": "y", "Dimensions": [2], "Datatype": "FP32"}]},
        {"Name": "d", "Outputs": [{"Name": "w", "Dimensions": [4], "DataType": "Half", "Format": "kLINEAR"}]},
        {"Name": "c", "Outputs": [{"Name": "z", "Dimensions": [9], "Datatype": "Int32"}]},
        "a name only",
    ]
    assert inspected_share(layers) == pytest.approx(10 / 12)
    assert inspected_share(["a name only"]) is None


def test_the_runtime_loads_no_foreign_or_damaged_engine(tmp_path: Path) -> None:
    file = convolution(tmp_path / "decode.onnx")
    engine = build(file, tmp_path / "engines", BATCH, targets=["8.6", "8.9"])
    version = trt.__version__
    assert find(file, "tensorrt-rtx", version, "8.9") == engine
    for name, of, target in (
        ("tensorrt-rtx", version, "12.0"),
        ("tensorrt-rtx", "1.0", "8.9"),
        ("tensorrt", version, "8.9"),
    ):
        with pytest.raises(EngineError, match=f"has no engine by {name} .* {target}; mlvgm export --engines {name}"):
            find(file, name, of, target)
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(EngineError):
        find(file, "tensorrt-rtx", version, "8.9")
    before = digest(file)
    file.with_name("decode.onnx.data").write_bytes(b"weights")
    assert digest(file) != before


def test_a_bundle_with_engines_has_their_digests(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    export_bundle(models.recipe(), models.purifier(), models.classifier(), out)
    build_bundle(out, targets=["8.9"])
    manifest = Manifest.read(out)
    assert sum(name.startswith("engines/") for name in manifest.files) == 2 * len(manifest.stages)
    assert manifest.report["tensorrt-rtx"] == {
        "version": trt.__version__,
        "half_share": {"encode": None, "decode": None, "classify": None},
    }
    build_bundle(out, targets=["8.6"])  # engines for other GPUs take the place of those
    assert sum(name.startswith("engines/") for name in Manifest.read(out).files) == 2 * len(manifest.stages)


class Config:
    """A builder's configuration that takes the timings of one GPU alone."""

    def __init__(self, gpu: bytes) -> None:
        self.gpu, self.cache = gpu, b"none"

    def create_timing_cache(self, known: bytes) -> bytes | None:
        return None if known == b"damaged" else known

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache not in (b"", self.gpu):
            return False
        self.cache = cache
        return True


@pytest.mark.parametrize(
    ("known", "taken"), [(b"H100", b"H100"), (b"A10", b""), (b"damaged", b""), (None, b"")], ids=str
)
def test_only_timings_of_this_gpu_are_taken(known: bytes | None, taken: bytes, tmp_path: Path) -> None:
    file = tmp_path / "timing.cache"
    if known is not None:
        file.write_bytes(known)
    config = Config(b"H100")
    tensorrt.use_timings(config, file)
    assert config.cache == taken


def test_what_is_missing_is_said_in_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    file = convolution(tmp_path / "decode.onnx")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeMissing, match="'tensorrt-rtx' finds no NVIDIA GPU"):
            runtimes.load("tensorrt-rtx", file, EngineOptions())
        assert "tensorrt-rtx" in runtimes.installed()
        assert "tensorrt-rtx" not in runtimes.available()
        with pytest.raises(BuildError, match="for this machine's GPU, and there is none"):
            tensorrt.capability()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RuntimeMissing, match=r"'tensorrt' cannot be imported .*pip install tensorrt"):
        load(file, EngineOptions())
    with pytest.raises(RuntimeMissing, match="pip install tensorrt"):
        build(file, tmp_path, BATCH, "tensorrt")
