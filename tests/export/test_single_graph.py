"""The pipeline as one graph: the answers of `Pipeline` under the same noise in both CPU runtimes, and its own noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from export import single_graph
from export.bundle import export_bundle
from export.onnx_graph import load_graph
from export.single_graph import FOLDER, GRAPH, REPLAY, REPORT, SingleGraphError, add_single_graph, replay
from handlers import runtimes
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline
from handlers.runtimes import EngineOptions
from tests import bundles
from tests.export import models

RUNTIMES = ("onnxruntime", "openvino")
WRITERS: dict[str, Callable[[Path], Manifest]] = {
    "nvae": bundles.write_nvae,
    "style": bundles.write_stylegan,
    "noisy": lambda folder: bundles.write_stylegan(folder, input_noise_l2=2.0),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported bundle with a single graph of 3 samples."""
    out = tmp_path_factory.mktemp("single") / "tiny"
    export_bundle(models.recipe(), models.purifier(), models.classifier(), out)
    add_single_graph(out, 3)
    return out


def same(found: dict[str, npt.NDArray[np.generic]], bundle: Path, images: npt.NDArray[np.uint8], runtime: str) -> None:
    with Pipeline.load(bundle, runtime) as pipeline:
        expected = pipeline.run(images, 3, range(len(images)))
    assert np.array_equal(found["label"], expected.labels)
    assert np.array_equal(found["votes"], expected.votes)
    assert np.array_equal(found["agreement"], expected.agreement)
    for name, theirs in (("mean_logits", expected.logits), ("purified", expected.purified), ("score", expected.scores)):
        assert found[name].shape == theirs.shape
        assert np.allclose(found[name], theirs, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("images", ["uint8", "float32"])
@pytest.mark.parametrize("kind", WRITERS)
def test_under_the_same_noise_the_answers_are_those_of_the_pipeline(
    kind: str, images: single_graph.ImageType, tmp_path: Path
) -> None:
    bundle = tmp_path / kind
    WRITERS[kind](bundle)
    manifest = add_single_graph(bundle, 3, images)
    for runtime in RUNTIMES:
        for count in (1, 5):
            pictures = bundles.images(count, seed=count)
            found = replay(manifest, bundle / FOLDER / REPLAY, pictures, 3, range(count), runtime, images)
            same(found, bundle, pictures, runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_exported_bundle(exported: Path, runtime: str) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    manifest = Manifest.read(exported)
    same(replay(manifest, exported / FOLDER / REPLAY, pictures, 3, range(4), runtime), exported, pictures, runtime)


def test_it_is_listed_compared_and_shares_its_weights(exported: Path) -> None:
    manifest = Manifest.read(exported)
    assert {name for name in manifest.files if name.startswith(FOLDER)} == {
        f"{FOLDER}/{name}" for name in (GRAPH, REPLAY, f"{GRAPH}.data")
    }
    report = manifest.report[REPORT]
    assert (report["samples"], report["images"], report["equal"]) == (3, "uint8", True)
    assert all(entry["relative_error"] <= 1e-4 for entry in report["worst"])
    for name in (GRAPH, REPLAY):
        graph = onnx.load(exported / FOLDER / name, load_external_data=False).graph
        assert all(len(tensor.raw_data) <= 1024 for tensor in graph.initializer)
    assert (exported / FOLDER / f"{GRAPH}.data").stat().st_size > 0


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_drawn_noise_is_standard_normal_and_differs(runtime: str, tmp_path: Path) -> None:
    """From latent to latent, sample to sample, image to image and call to call."""
    manifest = bundles.write_nvae(tmp_path / "nvae")
    stages = [load_graph(tmp_path / "nvae" / stage.file) for stage in manifest.stages]
    shapes = {"noise_0": (40, 40), "noise_1": (40, 40), "noise_2": (3,)}
    builder = single_graph._Builder(manifest, stages, 25, "float32", drawn=True)
    for name, value in builder.noise(shapes, builder.input("images", ir.DataType.FLOAT, ("B", 1))).items():
        builder.output(value, name, ir.DataType.FLOAT, *shapes[name])
    file = tmp_path / "noise.onnx"
    ir.save(ir.Model(builder.graph, ir_version=10), file)
    engine = runtimes.load(runtime, file, EngineOptions())
    calls = [engine.run({"images": np.zeros((8, 1), np.float32)}) for _ in range(2)]
    first, second, last = (np.stack([call[key] for call in calls]) for key in shapes)
    assert first.shape == (2, 200, 40, 40)
    assert last.shape == (2, 200, 3)
    rows = np.concatenate([first, second]).reshape(-1, 1600).astype(np.float64)
    assert len(np.unique(rows[:, 0])) > 0.99 * len(rows)
    assert np.abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 0.2  # eight standard deviations
    n = rows.size
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((rows**power).mean() - moment) < 6 * deviation / n**0.5, f"moment {power}"


def test_a_latent_that_is_drawn_decides_the_answer(tmp_path: Path) -> None:
    bundle = tmp_path / "nvae"
    bundles.write_nvae(bundle)
    add_single_graph(bundle, 4)
    pictures = np.repeat(bundles.images(1), 4, axis=0)
    for runtime in RUNTIMES:
        engine = runtimes.load(runtime, bundle / FOLDER / GRAPH, EngineOptions())
        purified = np.stack([engine.run({"images": pictures})["purified"] for _ in range(2)]).reshape(32, -1)
        assert len(np.unique(purified, axis=0)) == 32
        assert (engine.run({"images": pictures})["votes"].sum(axis=1) == 4).all()


def test_too_many_samples_or_another_answer_leave_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "nvae"
    manifest = bundles.write_nvae(bundle)
    with pytest.raises(SingleGraphError, match=r"999 samples are more than the \d+ of the bundle"):
        add_single_graph(bundle, 999)

    def another(*arguments: Any) -> dict[str, Any]:
        found = replay(*arguments)
        return {**found, "label": found["label"] + 1}

    monkeypatch.setattr(single_graph, "replay", another)
    with pytest.raises(SingleGraphError, match="differs from the pipeline"):
        add_single_graph(bundle, 2)
    assert Manifest.read(bundle) == manifest


def test_graphs_of_an_older_opset_are_raised_to_what_is_needed(tmp_path: Path) -> None:
    manifest = bundles.write_nvae(tmp_path / "nvae")
    assert {o.version for o in onnx.load(tmp_path / "nvae" / manifest.stages[-1].file).opset_import} == {17}
    add_single_graph(tmp_path / "nvae", 2)
    graph = onnx.load(tmp_path / "nvae" / FOLDER / GRAPH, load_external_data=False)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 18)]


def test_stages_with_two_versions_of_a_domain_are_refused(tmp_path: Path) -> None:
    manifest = bundles.write_nvae(tmp_path / "nvae")
    for version, stage in enumerate((manifest.stages[0], manifest.stages[-1]), 1):
        graph = onnx.load(tmp_path / "nvae" / stage.file)
        graph.opset_import.append(onnx.helper.make_opsetid("com.example", version))
        onnx.save(graph, tmp_path / "nvae" / stage.file)
    manifest.write(tmp_path / "nvae")
    with pytest.raises(SingleGraphError, match="opsets 1 and 2, which cannot be joined"):
        add_single_graph(tmp_path / "nvae", 2)
