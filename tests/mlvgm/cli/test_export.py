"""``mlvgm export --single-graph``, into an exported bundle: what it writes, and what ONNX Runtime makes of it."""

from pathlib import Path

import numpy as np
import pytest

from export.single_graph import FOLDER, GRAPH, REPLAY, replay
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline
from mlvgm.cli.main import main
from tests import bundles

ort = pytest.importorskip("onnxruntime")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    bundles.write_nvae(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_the_graph_runs_in_onnx_runtime_and_answers_as_the_pipeline(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--bundle", str(bundle), "--single-graph", "3"]) == 0
    said = capsys.readouterr()
    assert f"wrote {bundle / FOLDER / GRAPH}: 3 samples" in said.out + said.err
    pictures = bundles.images(6)
    with Pipeline.load(bundle, "onnxruntime") as pipeline:
        expected = pipeline.run(pictures, 3, range(6))
    found = replay(Manifest.read(bundle), bundle / FOLDER / REPLAY, pictures, 3, range(6), "onnxruntime")
    assert np.array_equal(found["label"], expected.labels)
    assert np.array_equal(found["votes"], expected.votes)

    session = ort.InferenceSession(str(bundle / FOLDER / GRAPH))
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [("images", "tensor(uint8)", ["B", 8, 8, 3])]
    (votes,) = session.run(["votes"], {"images": pictures})
    assert votes.sum(axis=1).tolist() == [3] * 6


def test_samples_are_the_bundles_unless_told(bundle: Path) -> None:
    default = Manifest.read(bundle).samples.default
    for words, samples in (([], default), (["2"], 2)):
        assert main(["export", "--bundle", str(bundle), "--single-graph", *words, "--images", "float32"]) == 0
        (given,) = ort.InferenceSession(str(bundle / FOLDER / GRAPH)).get_inputs()
        assert (given.type, given.shape) == ("tensor(float)", ["B", 3, 8, 8])
        found = ort.InferenceSession(str(bundle / FOLDER / GRAPH)).run(
            ["votes"], {given.name: np.zeros((1, 3, 8, 8), np.float32)}
        )
        assert found[0].sum() == samples


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--bundle", "BUNDLE", "--single-graph", "999"], "999 samples are more than the"),
        (["--bundle", "/nonexistent", "--single-graph"], "not a bundle"),
        (["--bundle", "BUNDLE", "--single-graph", "--recipe", "road-signs"], "--bundle exports nothing"),
        (["--bundle", "BUNDLE", "--single-graph", "--out", "other"], "--bundle exports nothing"),
        (["--single-graph"], "name a recipe with --recipe, or an exported bundle with --bundle"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_the_bundle(
    words: list[str], reason: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Manifest.read(bundle)
    assert main(["export", *(word.replace("BUNDLE", str(bundle)) for word in words)]) == 2
    error = capsys.readouterr().err
    assert reason in error.splitlines()[-1]
    assert Manifest.read(bundle) == before
    assert not (bundle / FOLDER).exists()


@pytest.mark.parametrize(
    ("words", "package", "reason"),
    [
        (["tensorrt-rtx", "--target", "8.99"], "tensorrt_rtx", "compute capability 8.99; it knows"),
        (["torch", "tensorrt-rtx", "--target", "sm_90"], "tensorrt_rtx", "compute capability sm_90; it knows"),
        (["tensorrt"], "", "tensorrt"),
        (["torch-tensorrt"], "", "torch-tensorrt"),
    ],
)
def test_engines_that_cannot_be_built_here_are_refused_before_the_work(
    words: list[str], package: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if package:
        pytest.importorskip(package)
    else:  # neither of them builds without a GPU
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("export.models.load_models", None)
    assert main(["export", "--recipe", "road-signs", "--engines", *words]) == 2
    said = capsys.readouterr()
    assert reason in said.err
    assert "loading" not in said.out
