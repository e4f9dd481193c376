"""The three published pipelines at full size: from a checkpoint to a served answer, against the official modules."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deploy.torchserve import TorchServe
from export import classifier, families
from export.engines.tensorrt import HALF_SHARE, build
from export.precision import to_fp16
from export.trace import trace
from handlers import runtimes
from handlers.image import encode_png
from handlers.manifest import Batch, Manifest
from handlers.pipeline import Pipeline
from mlvgm.load import load_classifier, load_purifier
from mlvgm.recipe import Recipe
from tests import reference
from tests.machine import free_port, stopped
from tests.reference import relative_error

VARIANTS = {"no_preprocessing": (False, 0.0), "blur": (True, 0.0), "noise": (False, None)}
MEMORY_GB = 16
SECONDS = 600


@dataclass(frozen=True)
class Published:
    """A recipe with the reference set that belongs to it."""

    recipe: str
    set: str
    family: str
    purifier: str
    classifier: str


PUBLISHED = (
    Published("stanford-cars", "cars", "style_transformer", "style_transformer_cars_512", "resnext50_cars"),
    Published("celeba-gender", "gender", "e4e", "e4e_ffhq_1024", "resnet50_gender"),
    Published("celeba-identities", "ids", "nvae", "nvae_celeba64", "vgg11_ids"),
)


@pytest.fixture(scope="module", params=PUBLISHED, ids=lambda item: item.recipe)
def published(request: pytest.FixtureRequest) -> Iterator[Published]:
    yield request.param
    for name in (request.param.purifier, request.param.classifier):
        reference.release(name)


@pytest.fixture(scope="module")
def bundle(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The bundle that the command line writes, within the promised memory and time."""
    folder = tmp_path_factory.mktemp(published.recipe)
    words = ["--recipe", published.recipe, "--out", str(folder / published.recipe)]
    words += ["--purifier", str(reference.checkpoint(published.purifier))]
    words += ["--classifier", str(reference.checkpoint(published.classifier))]
    begun = time.monotonic()
    peak_gb = _run([sys.executable, "-m", "mlvgm", "export", *words], folder)
    seconds = time.monotonic() - begun
    print(f"{published.recipe}: exported in {seconds:.0f} s with at most {peak_gb:.1f} GB")
    assert peak_gb <= MEMORY_GB
    assert seconds <= SECONDS
    yield folder / published.recipe
    shutil.rmtree(folder)


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_stages_agree_with_the_official_modules(
    published: Published, bundle: Path, variant: str, tmp_path: Path
) -> None:
    expected = reference.outputs(f"{published.set}_{variant}_seed1")
    meta = json.loads(str(expected["meta"]))
    draws = reference.draws_of(meta)
    noise = latent_noise(draws)
    known: dict[str, Any] = {
        "images": expected["images_u8"].astype(np.float32) / np.float32(255),
        "input_noise": draws[f"{published.set}.input.noise"],
        "alphas": np.float32(meta["interpolation_alphas"]) * np.float32(meta["alpha_attenuation"]),
        "noise": np.stack(noise, axis=1) if published.family != "nvae" else None,
    }
    known |= {f"noise_{i}": array for i, array in enumerate(noise)}
    blur, l2 = VARIANTS[variant]
    # The variants differ in their first stage alone.
    purifier = load_purifier(published.family, reference.checkpoint(published.purifier))
    first = families.stages(purifier, blur, meta["initial_noise_eps"] if l2 is None else l2)[0]
    trace(first, tmp_path / "encode.onnx")
    takes = [spec.name for spec in first.inputs]
    del purifier, first
    known |= _execute(tmp_path / "encode.onnx", takes, known)
    for stage in Manifest.read(bundle).stages[1:]:
        known |= _execute(bundle / stage.file, [tensor.name for tensor in stage.inputs], known)
    errors = {"purified": relative_error(known["images"], expected["purified"])}
    errors["logits"] = relative_error(known["logits"], expected["logits"])
    for name in ("codes", "mixed"):
        if name in known:
            errors[name] = relative_error(known[name], expected[name])
    print(published.recipe, variant, errors)
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.full
def test_pipeline_agrees_with_the_official_modules(published: Published, bundle: Path) -> None:
    expected = reference.outputs(f"{published.set}_no_preprocessing_seed1")
    meta = json.loads(str(expected["meta"]))
    noise = latent_noise(reference.draws_of(meta))
    alphas = np.clip(np.array(meta["interpolation_alphas"]) * meta["alpha_attenuation"], 0, 1)
    with Pipeline.load(bundle) as pipeline:
        result = pipeline.run(expected["images_u8"].transpose(0, 2, 3, 1), samples=1, noise=noise, alphas=list(alphas))
    assert relative_error(result.purified[:, 0], expected["purified"]) < 1e-4
    assert relative_error(result.sample_logits[:, 0], expected["logits"]) < 1e-4


@pytest.mark.full
def test_every_graph_becomes_an_engine_of_half_precision(published: Published, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    recipe = Recipe.read(published.recipe)
    purifier = load_purifier(published.family, reference.checkpoint(published.purifier))
    size, classes = recipe.image_size, len(recipe.classes)
    model = load_classifier(recipe.classifier.architecture, reference.checkpoint(published.classifier), classes)
    for stage in (*families.stages(purifier, False, 0.0), classifier.stage(model, size, classes)):
        file = tmp_path / f"{stage.name}.onnx"
        trace(to_fp16(stage), file)
        begun = time.monotonic()
        engine = build(file, tmp_path / "engines", Batch(recipe.batch.min, recipe.batch.opt, recipe.batch.max))
        share = json.loads(engine.with_suffix(".json").read_text())["half_share"]
        seconds, megabytes = time.monotonic() - begun, engine.stat().st_size / 1e6
        print(f"{published.recipe}, {stage.name}: {megabytes:.0f} MB in {seconds:.0f} s, half: {share:.1%}")
        assert share >= HALF_SHARE
        for path in tmp_path.rglob("*.*"):
            path.unlink()


@pytest.mark.full
@pytest.mark.server
def test_archive_is_served(published: Published, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLVGM_STATE", str(tmp_path / "state"))
    subprocess.run([sys.executable, "-m", "mlvgm", "archive", str(bundle), "--out", str(tmp_path)], check=True)
    size = Manifest.read(bundle).image_size
    picture = np.random.default_rng(0).random((3, *size), np.float32)
    with stopped(TorchServe(port=free_port())) as server:
        server.start([tmp_path / f"{published.recipe}.mar"])
        answer = server.client(timeout=300).predict(encode_png(picture), published.recipe, samples=1)
        print(published.recipe, answer["timing_ms"])
        assert answer["samples"] == 1
        assert sum(entry["votes"] for entry in answer["top_k"]) == 1


def latent_noise(draws: dict[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """One array per latent: NVAE's are drawn apart, those of the StyleGAN2 families in one array."""
    arrays = [draws[name] for name in sorted(draws) if ".purify." in name]
    return arrays if len(arrays) > 1 else list(arrays[0])


def _execute(file: Path, inputs: list[str], known: dict[str, Any]) -> dict[str, Any]:
    engine = runtimes.load("onnxruntime", file, runtimes.EngineOptions())
    try:
        return dict(engine.run({name: np.ascontiguousarray(known[name]) for name in inputs}))
    finally:
        engine.close()


# A process takes over the peak of the one that started it, and that of a test run is high: a small one stands between.
_PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def _run(command: list[str], folder: Path) -> float:
    """Runs ``command`` to its end; its peak of resident memory in GB, by way of a file in ``folder``."""
    peak = folder / "peak-kB"
    subprocess.run([sys.executable, "-c", _PEAK, str(peak), *command], check=True)
    return int(peak.read_text()) * 1024 / 1e9
