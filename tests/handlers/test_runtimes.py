import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from handlers import runtimes
from handlers.pipeline import Pipeline
from handlers.runtimes import EngineError, EngineOptions, RuntimeMissing, onnxruntime_cuda
from handlers.runtimes.device import DeviceArray
from handlers.runtimes.onnxruntime import session_of
from tests import bundles

CPU = torch.device("cpu")

NAMES = ["onnxruntime", "openvino"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_come_by_name_and_are_kept(nvae_bundle: Path, name: str) -> None:
    engine = runtimes.load(name, nvae_bundle / "encode.onnx", EngineOptions(threads=1))
    images = np.random.default_rng(0).random((5, 3, 8, 8), np.float32)
    first = engine.run({"images": images})
    kept = first["feature_1"].copy()
    engine.run({"images": images / 2})
    assert {"feature_0", "feature_1"} <= set(first)
    assert first["feature_1"].shape == (5, 2, 4, 4)
    assert np.array_equal(first["feature_1"], kept), "a later run must not overwrite earlier outputs"
    engine.close()


def test_runtimes_agree_in_fp32(style_bundle: Path) -> None:
    results = []
    for name in NAMES:
        with Pipeline.load(style_bundle, name) as pipeline:
            results.append(pipeline.run(bundles.images(5), 8, range(5)))
    assert np.allclose(results[0].purified, results[1].purified, rtol=0, atol=1e-6)
    assert np.array_equal(results[0].votes, results[1].votes)


@pytest.mark.parametrize("name", NAMES)
def test_views_and_other_types_of_array_are_taken_as_they_are(nvae_bundle: Path, name: str) -> None:
    engine = runtimes.load(name, nvae_bundle / "encode.onnx", EngineOptions())
    images = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    view = images.transpose(0, 3, 1, 2)[::2]
    assert np.allclose(
        engine.run({"images": view})["feature_1"], engine.run({"images": view.copy()})["feature_1"], atol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_engine_is_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"x\.onnx"):
        runtimes.load(name, tmp_path / "x.onnx", EngineOptions())


@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs_are_an_engine_error(nvae_bundle: Path, name: str) -> None:
    engine = runtimes.load(name, nvae_bundle / "encode.onnx", EngineOptions())
    with pytest.raises(EngineError):
        engine.run({"images": np.zeros((1, 3, 9, 8, 2), np.float32)})


def test_auto_takes_an_installed_one() -> None:
    assert runtimes.choose("auto") in runtimes.installed()
    assert set(NAMES) <= set(runtimes.installed())


def test_an_unknown_runtime_lists_the_known_ones(nvae_bundle: Path) -> None:
    with pytest.raises(RuntimeMissing, match="known are auto, onnxruntime, openvino"):
        Pipeline.load(nvae_bundle, "tensorflow")


def test_a_missing_runtime_says_what_to_install(nvae_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "_is_installed", lambda _: False)
    with pytest.raises(RuntimeMissing, match="pip install onnxruntime"):
        Pipeline.load(nvae_bundle, "onnxruntime")
    with pytest.raises(RuntimeMissing, match="pip install openvino or pip install onnxruntime"):
        Pipeline.load(nvae_bundle)


def test_a_runtime_that_cannot_be_imported_says_so(nvae_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "handlers.runtimes.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RuntimeMissing, match="cannot be imported"):
        runtimes.load("openvino", nvae_bundle / "encode.onnx", EngineOptions())


def test_cuda_is_refused_without_a_gpu(nvae_bundle: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime_cuda.ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(RuntimeMissing, match="onnxruntime-gpu"):
        onnxruntime_cuda.load(nvae_bundle / "encode.onnx", EngineOptions())


def bound(file: Path) -> "onnxruntime_cuda.BoundEngine":
    """What runs on a GPU, on the CPU."""
    return onnxruntime_cuda.BoundEngine(session_of(file, EngineOptions(threads=1), ["CPUExecutionProvider"]), CPU)


@pytest.mark.parametrize("write", [bundles.write_nvae, bundles.write_stylegan])
def test_a_pipeline_on_bound_tensors_gives_what_arrays_give(
    write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    with Pipeline.load(tmp_path, "onnxruntime", 1) as pipeline:
        expected = pipeline.run(bundles.images(5), 3, range(5))
    taken = []
    run = onnxruntime_cuda.BoundEngine.run

    def watched(engine: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        taken.append({name: isinstance(array, DeviceArray) for name, array in inputs.items()})
        return run(engine, inputs)

    monkeypatch.setattr(onnxruntime_cuda.BoundEngine, "run", watched)
    monkeypatch.setattr("handlers.runtimes.onnxruntime.load", lambda file, _: bound(file))
    with Pipeline.load(tmp_path, "onnxruntime") as pipeline:
        found = pipeline.run(bundles.images(5), 3, range(5))
        assert np.array_equal(found.sample_logits, expected.sample_logits)
        assert np.array_equal(found.purified, expected.purified)
    fetched = {name for inputs in taken for name, stayed in inputs.items() if not stayed}
    assert {name for name in fetched if "noise" not in name} == {"images", "alphas"}, "what stages gave has left"
    assert {"images": True} in taken, "the classifier takes purified images where they are"


def test_bound_outputs_are_kept_and_wrong_inputs_one_error(nvae_bundle: Path) -> None:
    engine = bound(nvae_bundle / "encode.onnx")
    images = np.random.default_rng(0).random((5, 3, 8, 8), np.float32)
    first = engine.run({"images": images})["feature_1"]
    kept = np.array(first)
    engine.run({"images": images / 2})
    assert np.array_equal(np.asarray(first), kept)
    for wrong in ({"images": np.zeros((1, 3, 9, 8, 2), np.float32)}, {}):
        with pytest.raises(EngineError, match="ONNX Runtime"):
            engine.run(wrong)
    engine.close()


def test_a_bundle_names_its_runtime(tmp_path: Path) -> None:
    bundles.write_nvae(tmp_path, runtime="onnxruntime")
    with Pipeline.load(tmp_path) as pipeline:
        assert pipeline.runtime == "onnxruntime"
    with Pipeline.load(tmp_path, "openvino") as pipeline:
        assert pipeline.runtime == "openvino"
