"""An exported bundle computes, through the server's own pipeline, what the reference computes."""

import dataclasses
import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from export.bundle import ExportError, export_bundle
from export.compare import Comparison, ParityError, check
from export.precision import LIMITS
from export.trace import TraceError
from handlers import runtimes
from handlers.pipeline import Pipeline
from tests.devices import OnDevice
from tests.export import models
from tests.reference import relative_error

RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "tiny"
    export_bundle(models.recipe(), models.purifier(), models.classifier(), out)
    return out


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("batch", [1, 3])
def test_pipeline_agrees_with_the_reference(bundle: Path, runtime: str, batch: int) -> None:
    pytest.importorskip(runtime)
    purifier, classifier = models.purifier(), models.classifier()
    torch.manual_seed(batch)
    images, samples = torch.rand(batch, 3, 32, 32), 2
    noise = [torch.randn(batch * samples, *shape) for shape in purifier.noise_shapes]
    eager = purifier.purify(images.repeat_interleave(samples, dim=0), noise, models.recipe().effective_alphas("linear"))
    logits = classifier(eager.images).unflatten(0, (batch, samples)).mean(dim=1)
    with Pipeline.load(bundle, runtime=runtime) as pipeline:
        result = pipeline.run(images.numpy(), samples=samples, noise=[tensor.numpy() for tensor in noise])
    assert relative_error(result.purified.reshape(-1, 3, 32, 32), eager.images) < 1e-4
    assert relative_error(result.logits, logits) < 1e-4
    assert relative_error(result.unpurified_logits, classifier(images)) < 1e-4


def test_outputs_that_stay_on_a_gpu_are_compared_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, fetched = runtimes.load, list[tuple[int, ...]]()
    monkeypatch.setattr(runtimes, "load", lambda *given: OnDevice(load(*given), fetched))
    export_bundle(models.recipe(), models.purifier(), models.classifier(), tmp_path / "tiny", with_programs=True)
    assert fetched


def test_input_noise_is_an_input(tmp_path: Path) -> None:
    recipe = models.recipe(blur=True, input_noise_l2=1.0)
    export_bundle(recipe, models.purifier(), models.classifier(), tmp_path / "noisy")
    purifier = models.purifier()
    torch.manual_seed(0)
    images, input_noise = torch.rand(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    noise = [torch.randn(2, *shape) for shape in purifier.noise_shapes]
    eager = purifier.purify(images, noise, recipe.effective_alphas(), True, input_noise, 1.0)
    with Pipeline.load(tmp_path / "noisy", runtime="onnxruntime") as pipeline:
        result = pipeline.run(
            images.numpy(), samples=1, noise=[t.numpy() for t in noise], input_noise=input_noise.numpy()
        )
    assert relative_error(result.purified[:, 0], eager.images) < 1e-4


def test_manifest_carries_the_parity_report(bundle: Path) -> None:
    manifest = json.loads((bundle / "pipeline.json").read_text())
    report = manifest["report"]["parity"]
    assert report["batches"] == [1, 2, 3, 4]
    assert {entry["stage"] for entry in report["worst"]} == {"encode", "decode", "classify", "end to end"}
    assert all(0 <= entry["relative_error"] < 1e-4 for entry in report["worst"])
    assert manifest["alphas"]["linear"] == pytest.approx([0.175, 0.35, 0.7])


def test_graphs_draw_no_random_numbers_and_have_no_batch_norm_left_to_fold(bundle: Path) -> None:
    for name in ("decode", "classify"):
        operators = {node.op_type for node in onnx.load(bundle / f"{name}.onnx").graph.node}
        assert not operators & {"RandomNormal", "RandomNormalLike", "RandomUniform", "BatchNormalization"}


def test_over_the_limit_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "fp32", 1e-12)
    with pytest.raises(ParityError, match=r"is .* off its reference at batch"):
        export_bundle(models.recipe(), models.purifier(), models.classifier(), tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_not_finite_is_over_every_limit() -> None:
    with pytest.raises(ParityError, match="stage decode: images is inf off"):
        check([Comparison("decode", "images", 1, float("inf"), float("nan"), 1e-4)])


def test_models_that_do_not_fit_the_recipe(tmp_path: Path) -> None:
    for change, words in (
        ({"image_size": 64}, "images are 64 px"),
        ({"n_latents": 4, "alphas": {}}, "has 4 latents"),
    ):
        recipe = dataclasses.replace(models.recipe(), **change)
        with pytest.raises(ExportError, match=words):
            export_bundle(recipe, models.purifier(), models.classifier(), tmp_path / "tiny")


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="is there already and is no bundle"):
        export_bundle(models.recipe(), models.purifier(), models.classifier(), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_classifier_that_cannot_be_traced(tmp_path: Path) -> None:
    class Awkward(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            means = images.mean(dim=(2, 3))
            return means if float(means.sum()) > 0 else -means

    with pytest.raises(TraceError, match="stage classify cannot be exported"):
        export_bundle(models.recipe(), models.purifier(), Awkward(), tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_no_latent_is_resampled_in_runs_once_for_all_samples(precision: str, bundle: Path, tmp_path: Path) -> None:
    recipe = models.recipe()
    fine = dataclasses.replace(
        recipe, precision=precision, schedule="fine", alphas={**recipe.alphas, "fine": (0.0, 0.0, 0.9)}
    )
    limit = LIMITS[precision]
    export_bundle(fine, models.purifier(), models.classifier(), tmp_path / "fine")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
    with (
        Pipeline.load(tmp_path / "fine", "onnxruntime") as pipeline,
        Pipeline.load(bundle, "onnxruntime") as whole,
    ):
        assert [stage.name for stage in pipeline.manifest.stages] == ["encode", "coarse", "decode", "classify"]
        assert [stage.name for stage in whole.manifest.stages] == ["encode", "decode", "classify"]
        engine, rows = pipeline._engines["coarse"], list[int]()
        run = engine.run
        engine.run = lambda feeds: rows.append(len(feeds["feature_0"])) or run(feeds)  # type: ignore[method-assign]
        # The second schedule resamples a coarse latent: its decoding differs between samples.
        for alphas, once in (("fine", True), ([0.5, 0, 0.9], False), ([0, 0.5, 0], False), ([0, 0, 0], True)):
            rows.clear()
            effective = pipeline.manifest.alphas["fine"] if alphas == "fine" else alphas
            found = pipeline.run(images, 4, range(3), alphas=alphas)
            expected = whole.run(images, 4, range(3), alphas=effective)
            assert sum(rows) == (3 if once else 12)
            assert relative_error(found.purified, expected.purified) < limit
            assert relative_error(found.logits, expected.logits) < limit
