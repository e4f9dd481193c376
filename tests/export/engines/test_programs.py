"""Programs of PyTorch: what they compute, which is taken for which graph, and that nothing in one is ever executed."""

import dataclasses
import hashlib
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import classifier, families
from export.bundle import ExportError, export_bundle
from export.engines import programs
from export.precision import to_fp16
from export.stage import Stage
from export.trace import example, trace
from handlers import runtimes
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline
from handlers.runtimes import EngineError, EngineOptions, RuntimeMissing, engine_store, pt2
from handlers.runtimes import torch as runtime
from handlers.runtimes.compiled import Compiled
from handlers.runtimes.cuda_graphs import Computation, CudaGraphs
from mlvgm.resnet import read_resnet50
from tests.devices import record_on_cpu
from tests.export import models
from tests.export.families.test_stylegan2 import purifier
from tests.mlvgm import small

CLOSE = {"fp32": 1e-5, "fp16": 2e-3}


def stages_of(family: str, folder: Path) -> list[Stage]:
    if family == "nvae":
        return [*families.stages(models.purifier(), False, 0.0), classifier.stage(models.classifier(), 32, 3)]
    model = purifier(family, folder)
    last = read_resnet50(small.save(small.resnet(), folder), 3)
    return [*families.stages(model, False, 0.0), classifier.stage(last, model.image_size, 3)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", ["nvae", "e4e", "style_transformer"])
def test_programs_and_graphs_agree_in_every_batch(
    family: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as on a GPU: channels last, compiled by a stand-in and recorded for each number of rows, on the CPU."""
    record_on_cpu(monkeypatch)
    for stage in stages_of(family, tmp_path):
        made = to_fp16(stage) if precision == "fp16" else stage
        file = tmp_path / f"{stage.name}.onnx"
        trace(made, file)
        programs.write(made, file)
        graph, program = (runtimes.load(name, file, EngineOptions()) for name in ("onnxruntime", "torch"))
        assert isinstance(program, runtime.CpuProgram)
        laid_out = runtime.channels_last(pt2.read(engine_store.find(file, "torch", runtime.version(), suffix=".pt2")))
        as_on_gpu = Compiled(laid_out.module(check_guards=False), (1, 3), "eager")
        assert stage.inputs[0].batched
        function = dataclasses.replace(program._function, module=as_on_gpu)
        recorded = CudaGraphs(lambda inputs, f=function: Computation(partial(f, inputs)), torch.device("cpu"))  # type: ignore[misc]
        for rows in (1, 3):
            feeds = {spec.name: example(spec, rows, seed=i).numpy() for i, spec in enumerate(stage.inputs)}
            expected = graph.run(feeds)
            for found in (program.run(feeds), recorded.run(feeds)):
                for name, array in expected.items():
                    error = np.linalg.norm(np.asarray(found[name]) - array) / np.linalg.norm(array)
                    assert error < CLOSE[precision], (stage.name, name, rows)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", ["e4e", "style_transformer"])
def test_programs_blur_by_shifted_sums(family: str, precision: str, tmp_path: Path) -> None:
    """What is left of depthwise convolutions has three channels: those of the picture that ToRGB layers add to."""
    stage = stages_of(family, tmp_path)[2]
    (tmp_path / "decode.onnx").touch()
    path = programs.write(to_fp16(stage) if precision == "fp16" else stage, tmp_path / "decode.onnx")
    calls = [node for node in pt2.read(path).graph.nodes if node.op == "call_function"]
    filters = [node.args[1].meta["val"].shape for node in calls if "conv" in str(node.target)]
    assert stage.name == "decode"
    # Numbers that are read from tensors could not be recorded as a CUDA graph.
    assert not [node for node in calls if "item" in str(node.target) or "scalar" in str(node.target)]
    assert any(shape[-1] == 3 for shape in filters)
    assert {shape[0] for shape in filters if shape[-1] == 4} == {3}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("programs") / "tiny"
    export_bundle(models.recipe(), models.purifier(), models.classifier(), out, with_programs=True)
    return out


def test_a_bundle_with_programs_has_their_digests_is_compared_and_served(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    assert sorted(Path(name).suffix for name in manifest.files if name.startswith("engines/")) == [
        *[".json"] * len(manifest.stages),
        *[".pt2"] * len(manifest.stages),
    ]
    assert manifest.report["parity_torch"]["runtime"] == "torch"
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    with Pipeline.load(bundle, "torch") as fast, Pipeline.load(bundle, "onnxruntime") as plain:
        found, expected = (p.run(images, 4, [1, 2, 3]) for p in (fast, plain))
    assert np.allclose(found.purified, expected.purified, rtol=0, atol=1e-5)
    assert np.array_equal(found.votes, expected.votes)


def test_no_foreign_or_damaged_program_is_loaded(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "decode.onnx"
    file.write_bytes((bundle / "decode.onnx").read_bytes())
    with pytest.raises(EngineError, match=r"has no engine by torch .*; mlvgm export --engines torch builds one"):
        runtimes.load("torch", file, EngineOptions())
    monkeypatch.setattr(runtime, "version", lambda: "2.99.0")
    with pytest.raises(EngineError, match=r"has no engine by torch 2\.99\.0; "):
        runtimes.load("torch", bundle / "decode.onnx", EngineOptions())


class Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


Records = dict[str, bytes]


def sample_inputs(records: Records, evil: bytes) -> None:
    records["data/sample_inputs/model.pt"] = evil


def pickled_weight(records: Records, evil: bytes) -> None:
    config = json.loads(records["data/weights/model_weights_config.json"])
    entry = next(iter(config["config"].values()))
    entry["use_pickle"] = True
    records[f"data/weights/{entry['path_name']}"] = evil
    records["data/weights/model_weights_config.json"] = json.dumps(config).encode()


def opaque_object(records: Records, evil: bytes) -> None:
    config = {
        "config": {"x": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}
    }
    records["data/constants/opaque_obj_0"] = evil
    records["data/constants/model_constants_config.json"] = json.dumps(config).encode()


def older_format(records: Records, evil: bytes) -> None:
    records["data/weights/model.pt"] = evil


def compiled_code(records: Records, evil: bytes) -> None:
    records["data/aotinductor/model/wrapper.so"] = evil


def shape(records: Records, evil: bytes) -> None:
    model = records["models/model.json"].decode()
    at = model.index("Symbol(")
    records["models/model.json"] = (model[:at] + "open('evil','w')" + model[model.index(")", at) + 1 :]).encode()


def function(records: Records, evil: bytes) -> None:
    model = json.loads(records["models/model.json"])
    model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.hub.load"
    records["models/model.json"] = json.dumps(model).encode()


ATTACKS: Mapping[str, tuple[Callable[[Records, bytes], None], str]] = {
    "sample inputs": (sample_inputs, "it has sample inputs, which are pickled"),
    "a pickled weight": (pickled_weight, "is pickled: pickles are never loaded"),
    "an opaque object": (opaque_object, "opaque_obj_0 does not belong in an archive"),
    "an older format": (older_format, r"data/weights/model\.pt does not belong"),
    "compiled code": (compiled_code, r"wrapper\.so does not belong"),
    "a shape that is code": (shape, "is not a plain shape"),
    "a function": (function, r"it calls 'torch\.hub\.load', which is not an operator"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_in_an_archive_is_executed(
    name: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, reason = ATTACKS[name]
    file, trap = bundle / "decode.onnx", tmp_path / "trap"
    archive = engine_store.find(file, "torch", runtime.version(), suffix=".pt2")
    with zipfile.ZipFile(archive) as source:
        root = source.namelist()[0].partition("/")[0]
        records = {info.filename.removeprefix(f"{root}/"): source.read(info) for info in source.infolist()}
    change(records, pickle.dumps(Evil(trap)))
    (tmp_path / "engines").mkdir()
    (tmp_path / "decode.onnx").write_bytes(file.read_bytes())
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    writer.set_min_version(6)
    for record, content in records.items():
        if not record.startswith(".data/") and record != "byteorder":
            writer.write_record(record, content, len(content))
    writer.write_end_of_file()
    changed = tmp_path / "engines" / archive.name
    changed.write_bytes(buffer.getvalue())
    info = {**engine_store.read_info(archive), "engine": hashlib.sha256(buffer.getvalue()).hexdigest()}
    changed.with_suffix(".json").write_text(json.dumps(info))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match=reason):
        runtimes.load("torch", tmp_path / "decode.onnx", EngineOptions())
    assert not trap.exists()
    assert not (tmp_path / "evil").exists()


def test_a_damaged_archive_is_one_error(bundle: Path, tmp_path: Path) -> None:
    archive = engine_store.find(bundle / "decode.onnx", "torch", runtime.version(), suffix=".pt2")
    for size in (0, 10, archive.stat().st_size // 2):
        broken = tmp_path / "broken.pt2"
        broken.write_bytes(archive.read_bytes()[:size])
        with pytest.raises(EngineError, match=r"broken\.pt2: PyTorch cannot load it"):
            pt2.read(broken)


def test_archives_are_read_without_what_older_pytorch_lacks(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.11 cannot tell the size of a record. This one's own loader must, so only our look at it is tested."""
    monkeypatch.delattr(torch._C.PyTorchFileReader, "get_record_size", raising=False)
    archive = engine_store.find(bundle / "decode.onnx", "torch", runtime.version(), suffix=".pt2")
    pt2._check(archive)


def test_wrong_inputs_are_an_engine_error(bundle: Path) -> None:
    program = runtimes.load("torch", bundle / "encode.onnx", EngineOptions(threads=1))
    for wrong in ({"images": np.zeros((1, 3, 9, 32), np.float32)}, {}):
        with pytest.raises(EngineError, match="PyTorch"):
            program.run(wrong)


def test_a_classifier_in_onnx_is_refused_before_anything_is_traced(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"own\.onnx: a classifier in ONNX cannot become a program"):
        export_bundle(models.recipe(), models.purifier(), tmp_path / "own.onnx", tmp_path / "out", with_programs=True)
    assert not (tmp_path / "out").exists()


def test_torch_tensorrt_says_what_is_missing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.engines import torch_tensorrt

    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(RuntimeMissing, match=r"torch-tensorrt cannot be imported .*pip install torch-tensorrt"):
        torch_tensorrt.build_bundle(bundle)
