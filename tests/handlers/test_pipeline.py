import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers import vote
from handlers.engine_calls import NonFiniteError
from handlers.inputs import PipelineInputs
from handlers.manifest import Batch, Manifest
from handlers.noise import image_noise, latent_noise
from handlers.pipeline import PROGRESS, Pipeline
from handlers.runtimes import Array, EngineError, EngineOptions, memory
from tests import bundles
from tests.devices import OnDevice

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=["nvae", "style", "noisy"])
def bundle(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{request.param}_bundle")
    return folder


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def pipeline(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, request.param, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def nvae(nvae_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(nvae_bundle, "onnxruntime", threads=1) as loaded:
        yield loaded


def run_engines(folder: Path, tensors: dict[str, Floats]) -> dict[str, Floats]:
    """The engines one after the other on one row, as a reader of the manifest would call them by hand."""
    for stage in Manifest.read(folder).stages:
        session = ort.InferenceSession(folder / stage.file, providers=["CPUExecutionProvider"])
        feeds = {given.name: tensors[given.name] for given in session.get_inputs()}
        outputs = session.run(None, feeds)
        tensors = tensors | {out.name: array for out, array in zip(session.get_outputs(), outputs, strict=True)}
    return tensors


def test_every_copy_is_what_the_engines_give_by_hand(pipeline: Pipeline, bundle: Path) -> None:
    manifest, images, seeds, copies = pipeline.manifest, bundles.images(3), [5, 6, 7], 4
    result = pipeline.run(images, copies, seeds)
    for b, seed in enumerate(seeds):
        pixels = images[b : b + 1].transpose(0, 3, 1, 2).astype(np.float32) / 255
        for k in range(copies):
            noise = [latent_noise([seed], [k], i, shape) for i, shape in enumerate(manifest.noise_shapes)]
            tensors = {f"noise_{i}": array for i, array in enumerate(noise)}
            if manifest.family == "e4e":
                tensors["noise"] = np.stack(noise, axis=1)
            tensors["alphas"] = np.array(manifest.alphas[manifest.default_alphas], np.float32)
            tensors["input_noise"] = image_noise([seed], [k], (8, 8))
            expected = run_engines(bundle, {"images": pixels, **tensors})
            assert np.allclose(result.purified[b, k], expected["images"][0], atol=1e-5)
            assert np.allclose(result.sample_logits[b, k], expected["logits"][0], atol=1e-4)


@settings(max_examples=4)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=9), st.integers(1, 5))
def test_an_answer_does_not_depend_on_the_batch(pipeline: Pipeline, seeds: list[int], copies: int) -> None:
    images = bundles.images(len(seeds))
    together = pipeline.run(images, copies, seeds)
    for i, seed in enumerate(seeds):
        alone = pipeline.run(images[i : i + 1], copies, [seed])
        assert np.allclose(alone.sample_logits[0], together.sample_logits[i], rtol=0, atol=1e-5)
        assert np.allclose(alone.purified[0], together.purified[i], rtol=0, atol=1e-6)
        assert np.array_equal(alone.votes[0], together.votes[i])
        assert alone.labels[0] == together.labels[i]


def test_more_samples_begin_with_the_same_copies(pipeline: Pipeline) -> None:
    few, many = (pipeline.run(bundles.images(2), copies, [1, 2]) for copies in (3, 9))
    assert np.allclose(few.purified, many.purified[:, :3], atol=1e-6)


def test_auto_draws_the_first_samples_of_the_maximum_until_the_vote_is_decided(pipeline: Pipeline) -> None:
    images, seeds, most = bundles.images(13), range(13), pipeline.manifest.samples.max
    auto, full = (pipeline.run(images, samples, seeds) for samples in ("auto", most))
    assert set(auto.samples) <= set(vote.rounds(most))
    assert auto.sample_logits.shape[1] == auto.samples.max()
    for i, drawn in enumerate(auto.samples):
        assert np.allclose(auto.sample_logits[i, :drawn], full.sample_logits[i, :drawn], atol=1e-5)
        assert np.allclose(auto.purified[i, :drawn], full.purified[i, :drawn], atol=1e-6)
        assert np.isnan(auto.sample_logits[i, drawn:]).all()
        assert np.isnan(auto.purified[i, drawn:]).all()
        assert drawn == most or vote.decided(full.sample_logits[i : i + 1, :drawn], most)[0]
        assert auto.votes[i].sum() == drawn
        first = pipeline.run(images[i : i + 1], int(drawn), [i])
        for value in ("logits", "confidences", "agreement", "scores", "labels", "ranking"):
            assert np.allclose(getattr(auto, value)[i], getattr(first, value)[0], atol=1e-5)
        assert np.allclose(auto.representative(i), first.representative(0), atol=1e-6)
    assert np.allclose(auto.unpurified_logits, full.unpurified_logits, atol=1e-5)
    assert (auto.labels == full.labels).mean() > 0.9


@settings(max_examples=4)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=20))
def test_auto_does_not_depend_on_the_batch(pipeline: Pipeline, seeds: list[int]) -> None:
    images = bundles.images(len(seeds))
    together = pipeline.run(images, "auto", seeds)
    for i, seed in enumerate(seeds):
        alone = pipeline.run(images[i : i + 1], "auto", [seed])
        drawn = alone.samples[0]
        assert drawn == together.samples[i]
        assert np.allclose(alone.sample_logits[0], together.sample_logits[i, :drawn], rtol=0, atol=1e-5)
        assert alone.labels[0] == together.labels[i]


def test_auto_replays_explicit_noise(nvae: Pipeline) -> None:
    most, seeds = nvae.manifest.samples.max, [3, 4]
    rows = [(seed, k) for seed in seeds for k in range(most)]
    noise = [latent_noise(*zip(*rows, strict=True), i, shape) for i, shape in enumerate(nvae.manifest.noise_shapes)]
    seeded, replayed = nvae.run(bundles.images(2), "auto", seeds), nvae.run(bundles.images(2), "auto", noise=noise)
    assert np.array_equal(seeded.sample_logits, replayed.sample_logits, equal_nan=True)


def test_one_sample_is_enough_where_nothing_is_random(nvae: Pipeline, noisy_bundle: Path) -> None:
    assert nvae.run(bundles.images(3), "auto", alphas="none").samples.tolist() == [1, 1, 1]
    with Pipeline.load(noisy_bundle, "onnxruntime") as noisy:
        assert noisy.run(bundles.images(1), "auto", alphas=[0, 0, 0]).samples[0] > 1


@pytest.mark.parametrize("on_device", [False, True])
def test_auto_encodes_once_and_batches_what_is_undecided(
    nvae: Pipeline, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = nvae.run(bundles.images(7), "auto", range(7))
    if on_device:
        fetched: list[tuple[int, ...]] = []
        monkeypatch.setattr(nvae, "_engines", {name: OnDevice(e, fetched) for name, e in nvae._engines.items()})
    rows = rows_by_call(nvae, "encode", monkeypatch)
    decoded: list[int] = []
    decode = nvae._engines["decode"].run
    monkeypatch.setattr(
        nvae._engines["decode"], "run", lambda feeds: decoded.append(len(feeds["noise_0"])) or decode(feeds)
    )
    result = nvae.run(bundles.images(7), "auto", range(7))
    assert np.array_equal(result.samples, expected.samples)
    assert np.allclose(result.sample_logits, expected.sample_logits, atol=1e-5, equal_nan=True)
    assert np.allclose(result.purified, expected.purified, atol=1e-6, equal_nan=True)
    assert sorted(rows) == [1, 2, 4], "each image once, in the sizes that engines are run at"
    assert len(set(expected.samples)) > 1
    per_round, before = [], 0
    for stop in vote.rounds(nvae.manifest.samples.max):
        per_round.append(int((expected.samples >= stop).sum()) * (stop - before))
        before = stop
    sizes = [
        [size for size in (8, 4, 2, 1) for _ in range(count // size if size == 8 else count // size % 2)]
        for count in per_round
    ]
    assert decoded == [size for round_sizes in sizes for size in round_sizes]


def test_the_result_has_the_shapes_of_the_contract(pipeline: Pipeline) -> None:
    result = pipeline.run(bundles.images(3), samples=4)
    assert result.logits.shape == (3, 3)
    assert result.votes.shape == (3, 3)
    assert result.samples.tolist() == [4, 4, 4]
    assert result.scores.shape == (3,)
    assert result.purified.shape == (3, 4, 3, 8, 8)
    assert result.purified.dtype == np.float32
    assert result.unpurified_logits.shape == (3, 3)
    assert (result.votes.sum(axis=1) == 4).all()
    assert set(result.timing_ms) == {"noise", *(stage.name for stage in pipeline.manifest.stages)}


def test_explicit_noise_replays_a_seeded_run(pipeline: Pipeline) -> None:
    manifest, seeds, copies = pipeline.manifest, [3, 4], 5
    rows = [(seed, k) for seed in seeds for k in range(copies)]
    row_seeds, samples = [seed for seed, _ in rows], [k for _, k in rows]
    noise = [latent_noise(row_seeds, samples, i, shape) for i, shape in enumerate(manifest.noise_shapes)]
    extra = image_noise(row_seeds, samples, (8, 8)) if manifest.input_noise_l2 else None
    seeded = pipeline.run(bundles.images(2), copies, seeds)
    replayed = pipeline.run(bundles.images(2), copies, noise=noise, input_noise=extra)
    assert np.array_equal(seeded.purified, replayed.purified)
    assert np.array_equal(seeded.sample_logits, replayed.sample_logits)


def test_bytes_and_floats_are_the_same_image(pipeline: Pipeline) -> None:
    images = bundles.images(2)
    floats = images.transpose(0, 3, 1, 2) / 255
    by_bytes, by_floats = (pipeline.run(given, 2, [1, 2]) for given in (images, floats))
    assert np.allclose(by_bytes.purified, by_floats.purified, atol=1e-6)
    assert np.allclose(pipeline.classify(images), by_floats.unpurified_logits, atol=1e-5)


def test_without_seeds_every_run_draws_anew(nvae: Pipeline) -> None:
    first, second = (nvae.run(bundles.images(1), 1) for _ in range(2))
    assert not np.array_equal(first.purified, second.purified)


def test_alphas_by_name_and_by_value(nvae: Pipeline) -> None:
    images = bundles.images(1)
    assert np.array_equal(nvae.run(images, 2, [1]).logits, nvae.run(images, 2, [1], alphas="linear").logits)
    assert np.array_equal(nvae.run(images, 2, [1], alphas=[0.5, 1]).logits, nvae.run(images, 2, [1]).logits)
    kept = nvae.run(images, 3, [1], alphas="none")
    assert np.array_equal(kept.purified[0, 0], kept.purified[0, 1])
    assert not np.allclose(kept.purified[0, 0], nvae.run(images, 3, [1]).purified[0, 0], atol=1e-3)


def test_input_noise_differs_between_copies(noisy_bundle: Path) -> None:
    with Pipeline.load(noisy_bundle, "onnxruntime") as noisy:
        result = noisy.run(bundles.images(1), 2, [1], alphas=[0, 0, 0])
    assert not np.allclose(result.purified[0, 0], result.purified[0, 1], atol=1e-4)


def rows_by_call(pipeline: Pipeline, stage: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of ``stage`` gets from now on."""
    rows: list[int] = []
    engine = pipeline._engines[stage]
    original = engine.run
    monkeypatch.setattr(engine, "run", lambda feeds: rows.append(len(feeds["images"])) or original(feeds))
    return rows


def test_one_encode_serves_all_copies(nvae: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_by_call(nvae, "encode", monkeypatch)
    nvae.run(bundles.images(3), samples=16)
    assert sum(rows) == 3


def test_noise_that_is_drawn_ahead_is_the_same(nvae_bundle: Path) -> None:
    manifest = Manifest.read(nvae_bundle)
    wanted = {t.name for stage in manifest.stages for t in stage.inputs if t.name.startswith("noise")}
    inputs = PipelineInputs.of(manifest, bundles.images(3), samples=3, seeds=[7, 8, 9])
    parts = [np.arange(4), np.arange(4, 8), np.array([8])]  # fewer rows than threads, too
    ahead, alone = (list(inputs.draw_each(manifest, parts, wanted, ahead)) for ahead in (True, False))
    assert [part.keys() for part in ahead] == [wanted] * len(parts)
    for found, expected in zip(ahead, alone, strict=True):
        assert all(np.array_equal(found[name], expected[name]) for name in wanted)


@pytest.mark.parametrize("batch", [Batch(1, 1, 1), Batch(1, 3, 5), Batch(4, 4, 8), Batch(1, 4, 8, cpu=2)])
def test_engines_only_see_the_sizes_of_their_profile(
    tmp_path: Path, nvae: Pipeline, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles.write_nvae(tmp_path, batch=batch)
    with Pipeline.load(tmp_path, "onnxruntime") as pipeline:
        warm: set[tuple[str, int]] = set()
        seen: set[tuple[str, int]] = set()
        for name, engine in pipeline._engines.items():

            def spy(feeds: dict[str, Floats], name: str = name, original: Any = engine.run) -> object:
                seen.add((name, len(next(iter(feeds.values())))))
                return original(feeds)

            monkeypatch.setattr(engine, "run", spy)
        pipeline.warm_up()
        warm, seen = seen, set()
        for count in range(1, 12):
            result = pipeline.run(bundles.images(count), 3, range(count))
            expected = nvae.run(bundles.images(count), 3, range(count))
            assert np.allclose(result.sample_logits, expected.sample_logits, atol=1e-5)
            pipeline.run(bundles.images(count), "auto", range(count))
    assert seen <= warm, "warm_up must run every size that requests can cause"
    sizes = [rows for _, rows in warm]
    assert batch.min <= min(sizes)
    assert max(sizes) == (batch.cpu or batch.max)


def test_an_image_and_its_copies_are_classified_in_one_call(nvae: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_by_call(nvae, "classify", monkeypatch)
    nvae.run(bundles.images(1))
    assert rows == [1 + nvae.manifest.samples.default]


def test_an_overflow_names_the_images_concerned(nvae: Pipeline) -> None:
    images = bundles.images(11)
    images[[2, 9]] = 255
    with pytest.raises(NonFiniteError, match="encode") as caught:
        nvae.run(images, 2)
    assert caught.value.items == [2]  # the first engine call that fails ends the run
    with pytest.raises(NonFiniteError) as caught:
        nvae.run(images[[2, 0, 9]], 2)
    assert caught.value.items == [0]


def test_a_white_image_is_finite_in_fp32(half_bundle: Path, tmp_path: Path) -> None:
    bundles.write_nvae(tmp_path)
    white = np.full((1, 8, 8, 3), 255, np.uint8)
    with Pipeline.load(half_bundle, "onnxruntime") as half, Pipeline.load(tmp_path, "onnxruntime") as single:
        with pytest.raises(NonFiniteError):
            half.run(white, 3, [1])
        assert half.fallback is not None
        expected = single.run(white, 3, [1])
        assert np.array_equal(half.fallback.run(white, 3, [1]).purified, expected.purified)
        assert half.fallback.fallback is None


def test_the_fallback_is_loaded_once_when_it_is_first_asked_for(
    half_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    closed: list[str] = []

    class Engine:
        def __init__(self, file: Path) -> None:
            self.file = file.name

        def close(self) -> None:
            closed.append(self.file)

    def load(_name: str, file: Path, options: EngineOptions) -> Engine:
        loaded.append(f"{file.name} {options.precision}{' compiled' * bool(options.compiled)}")
        return Engine(file)

    monkeypatch.setattr("handlers.runtimes.load", load)
    with Pipeline.load(half_bundle, "onnxruntime") as pipeline:
        assert loaded == [f"{name}.onnx fp16 compiled" for name in ("encode", "decode", "classify")]
        loaded.clear()
        assert pipeline.fallback is pipeline.fallback
        assert loaded == ["encode.fp32.onnx fp32", "decode.onnx fp32", "classify.onnx fp32"]
    assert sorted(closed) == sorted(["encode.onnx", "encode.fp32.onnx"] + ["decode.onnx", "classify.onnx"] * 2)


def test_a_fallback_that_cannot_be_loaded_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundles.write_half(tmp_path)
    with Pipeline.load(tmp_path, "onnxruntime") as pipeline:
        (tmp_path / "encode.fp32.onnx").unlink()
        assert pipeline.fallback is None
        assert "cannot be loaded in fp32" in caplog.text
        caplog.clear()
        assert pipeline.fallback is None
        assert not caplog.text, "it is tried once"


@pytest.mark.parametrize(
    ("runtime", "precision", "has_one"),
    [("openvino", "bf16", True), ("onnxruntime", "bf16", False), ("openvino", "fp32", False)],
)
def test_bf16_is_computed_again_in_fp32(tmp_path: Path, runtime: str, precision: str, has_one: bool) -> None:
    """OpenVINO computes an fp32 graph in bf16; ONNX Runtime computes it as it is, and would only repeat itself."""
    bundles.write_nvae(tmp_path, precision=precision)
    with Pipeline.load(tmp_path, runtime, threads=1) as pipeline:
        assert (pipeline.fallback is not None) == has_one


@pytest.mark.parametrize(("name", "output"), [("decode", "images"), ("classify", "logits")])
def test_what_a_device_gives_is_checked(
    nvae: Pipeline, monkeypatch: pytest.MonkeyPatch, name: str, output: str
) -> None:
    class Broken(OnDevice):
        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            outputs = super().run(inputs)
            outputs[output].tensor[-1] = np.inf
            return outputs

    monkeypatch.setitem(nvae._engines, name, Broken(nvae._engines[name], []))
    with pytest.raises(NonFiniteError, match=name) as caught:
        nvae.run(bundles.images(2), 1)
    assert caught.value.items == [1]


@pytest.mark.parametrize("family", ["nvae", "style"])
def test_from_a_device_only_logits_come_until_the_images_are_wanted(
    family: str, request: pytest.FixtureRequest
) -> None:
    with Pipeline.load(request.getfixturevalue(f"{family}_bundle"), "onnxruntime") as pipeline:
        expected = pipeline.run(bundles.images(5), 3, range(5))
        fetched: list[tuple[int, ...]] = []
        pipeline._engines.update({name: OnDevice(e, fetched) for name, e in pipeline._engines.items()})
        result = pipeline.run(bundles.images(5), 3, range(5))
        assert np.allclose(result.logits, expected.logits, rtol=0, atol=1e-5)
        assert np.allclose(result.unpurified_logits, expected.unpurified_logits, rtol=0, atol=1e-5)
        assert {shape[1:] for shape in fetched} == {(len(bundles.CLASSES),)}
        assert sum(shape[0] for shape in fetched) == 5 + 5 * 3, "each row of logits comes once"
        fetched.clear()
        assert np.allclose(result.purified, expected.purified, rtol=0, atol=1e-6)
        assert sum(shape[0] for shape in fetched) == 5 * 3
        fetched.clear()
        assert result.purified is result.purified
        assert not fetched, "they are fetched once"


@pytest.mark.parametrize("batch", [Batch(1, 8, 64), Batch(1, 1, 1), Batch(1, 3, 5), Batch(4, 4, 8), Batch(3, 8, 8)])
def test_until_a_size_is_warm_batches_are_made_of_others(
    tmp_path: Path, nvae: Pipeline, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that no answer waits for the rest: it is held up here until the answers are there."""
    bundles.write_nvae(tmp_path, batch=batch)
    rest, seen = threading.Event(), set[int]()
    run_once = Pipeline._run_once

    def held(pipeline: Pipeline, size: int, i: int) -> None:
        if i > 2:
            rest.wait(60)
        run_once(pipeline, size, i)

    monkeypatch.setattr(Pipeline, "_run_once", held)
    with Pipeline.load(tmp_path, "onnxruntime") as pipeline:
        every = pipeline._buckets, pipeline._classify_buckets
        for engine in pipeline._engines.values():

            def spy(feeds: dict[str, Floats], original: Any = engine.run) -> object:
                seen.add(len(next(iter(feeds.values()))))
                return original(feeds)

            monkeypatch.setattr(engine, "run", spy)
            monkeypatch.setattr(engine, "takes_threads", True, raising=False)
        pipeline.warm_up_behind()
        warm = set(seen)
        for count in (1, 2, 7, 11):
            result = pipeline.run(bundles.images(count), 3, range(count))
            expected = nvae.run(bundles.images(count), 3, range(count))
            assert np.allclose(result.sample_logits, expected.sample_logits, atol=1e-5)
        assert seen == warm, "no size is used before it is warm"
        rest.set()
        assert pipeline._warming
        pipeline._warming.join()
        assert (pipeline._buckets, pipeline._classify_buckets) == every


def test_a_size_that_fails_behind_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundles.write_nvae(tmp_path, batch=Batch(1, 8, 8))
    run_once = Pipeline._run_once

    def failing(pipeline: Pipeline, size: int, i: int) -> None:
        if size == 4:
            raise EngineError("no memory")
        run_once(pipeline, size, i)

    monkeypatch.setattr(Pipeline, "_run_once", failing)
    with Pipeline.load(tmp_path, "openvino", 1) as pipeline:
        pipeline.warm_up_behind()
        assert pipeline._warming
        pipeline._warming.join()
        assert pipeline._buckets == [8, 2, 1]
        assert "batches of 4 rows fail" in caplog.text
        assert pipeline.run(bundles.images(7), 3).sample_logits.shape == (7, 3, 3)


def test_closing_ends_the_warm_up(tmp_path: Path) -> None:
    bundles.write_nvae(tmp_path)
    pipeline = Pipeline.load(tmp_path, "openvino", 1)
    pipeline.warm_up_behind()
    pipeline.close()
    assert pipeline._warming
    assert not pipeline._warming.is_alive()


def test_engines_without_threads_are_warm_before_the_first_answer(tmp_path: Path) -> None:
    bundles.write_nvae(tmp_path)
    with Pipeline.load(tmp_path, "onnxruntime", 1) as pipeline:
        pipeline.warm_up_behind()
        assert pipeline._warming is None


def test_large_engines_are_run_once_before_the_first_answer(
    tmp_path: Path, nvae: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the smallest batch; then all sizes are used."""
    monkeypatch.setattr("handlers.runtimes.memory.LARGE_BYTES", 0)
    sizes, run_once = list[int](), Pipeline._run_once

    def noted(pipeline: Pipeline, size: int, i: int) -> None:
        sizes.append(size)
        run_once(pipeline, size, i)

    monkeypatch.setattr(Pipeline, "_run_once", noted)
    bundles.write_nvae(tmp_path, batch=Batch(1, 8, 8))
    with Pipeline.load(tmp_path, "openvino", 1) as pipeline:
        pipeline.warm_up_behind()
        assert (sizes, pipeline._warming, pipeline._buckets) == ([1], None, [8, 4, 2, 1])
        result, expected = (each.run(bundles.images(7), 3, range(7)) for each in (pipeline, nvae))
        assert np.allclose(result.sample_logits, expected.sample_logits, atol=1e-5)


def test_warming_up_says_how_far_it_is(nvae: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        nvae.warm_up()
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in lines] == [f"{PROGRESS} {rows} rows at once" for rows in (8, 6, 4, 2, 1)]
    assert lines[-1].endswith("(5 of 5)")


def test_certified_radii_never_exceed_those_of_a_linear_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes 0 and 1 meet in a plane through mid-gray, and the purifier changes nothing: radii are distances."""
    # Of one image in a thousand the radius may be too large: not of these with this noise.
    monkeypatch.setattr("handlers.certify.fresh_generator", lambda: np.random.Generator(np.random.Philox(0)))
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(3 * bundles.SIZE**2)
    normal /= np.linalg.norm(normal)
    weights = np.stack([normal, -normal, np.zeros_like(normal)], axis=1).astype(np.float32)
    bundles.write_plain(tmp_path, weights)
    moved = 128 + 255 * np.linspace(-0.4, 0.4, 9)[:, None] * normal
    images = np.rint(moved).astype(np.uint8).reshape(-1, 3, bundles.SIZE, bundles.SIZE)
    distances = (images.reshape(9, -1) / 255 - 0.5) @ normal
    with Pipeline.load(tmp_path, "onnxruntime") as pipeline:
        certified = pipeline.certify(images.transpose(0, 2, 3, 1), sigma=0.1, draws=400, alpha=0.001)
    assert certified.counts.shape == (9, 3)
    assert (certified.counts.sum(axis=1) == 400).all()
    sure = ~certified.abstained
    assert sure[[0, 1, 7, 8]].all()
    assert (certified.labels[sure] == (distances[sure] < 0)).all()
    assert (certified.radii <= np.abs(distances) + 0.002).all()
    assert certified.radii.max() > 0.2


def test_certificates_classify_purified_samples_and_nothing_else(
    nvae: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {name: rows_by_call(nvae, name, monkeypatch) for name in ("encode", "classify")}
    certified = nvae.certify(bundles.images(2), draws=50)
    assert rows["encode"] == rows["classify"]
    assert sum(rows["classify"]) == 2 * (50 + 10)
    assert (certified.sigma, certified.draws, certified.alpha) == (0.25, 50, 0.001)
    assert (certified.counts.sum(axis=1) == 50).all()


def test_a_draw_that_overflows_is_drawn_for_no_class(nvae: Pipeline, half_bundle: Path) -> None:
    white = np.full((1, 8, 8, 3), 255, np.uint8)
    barely = {"sigma": 1e-6, "draws": 20}  # so that the noise is rounded away
    assert nvae.certify(white, **barely).counts.sum() == 0
    assert nvae.certify(white, **barely).abstained.all()
    beside = nvae.certify(np.concatenate([white, bundles.images(1)]), **barely)
    assert beside.counts.sum(axis=1).tolist() == [0, 20]
    with Pipeline.load(half_bundle, "onnxruntime") as half:
        assert half.certify(white, **barely).counts.sum() == 20, "computed in fp32"


def test_certificates_need_sensible_arguments(nvae: Pipeline) -> None:
    for wrong, reason in (({"sigma": -1}, "sigma"), ({"draws": 0}, "draws"), ({"alphas": "sine"}, "one of linear")):
        with pytest.raises(ValueError, match=reason):
            nvae.certify(bundles.images(1), **wrong)


WRONG_ARGUMENTS = {
    "no image": ({"images": bundles.images(0)}, "images must be"),
    "one image without batch": ({"images": bundles.images(1)[0]}, "images must be"),
    "wrong size": ({"images": np.zeros((1, 9, 8, 3), np.uint8)}, "images must be"),
    "wrong axes": ({"images": np.zeros((1, 3, 8, 8), np.uint8)}, "images must be"),
    "integers": ({"images": np.zeros((1, 3, 8, 8), np.int64)}, "images must be"),
    "out of range": ({"images": np.full((1, 3, 8, 8), 1.1)}, "0 to 1"),
    "NaN": ({"images": np.full((1, 3, 8, 8), np.nan)}, "0 to 1"),
    "no samples": ({"samples": 0}, "samples must be 1 to 16"),
    "too many samples": ({"samples": 17}, "samples must be 1 to 16 or 'auto'"),
    "samples by another name": ({"samples": "all"}, "samples must be 1 to 16 or 'auto'"),
    "half a sample": ({"samples": 2.5}, "samples must be 1 to 16 or 'auto'"),
    "seeds": ({"seeds": [1, 2]}, "seeds must hold one"),
    "negative seed": ({"seeds": [-1]}, "seeds must be 0 to"),
    "large seed": ({"seeds": [2**63]}, "seeds must be 0 to"),
    "schedule": ({"alphas": "sine"}, "one of linear, none"),
    "weights": ({"alphas": [0.5]}, "alphas must have shape"),
    "weight": ({"alphas": [0.5, 2]}, "0 to 1"),
    "noise count": ({"noise": [np.zeros((5, 2, 2, 2))]}, "2 latents"),
    "noise rows": ({"noise": [np.zeros((1, 2, 2, 2)), np.zeros((5, 2, 4, 4))]}, r"noise\[0\]"),
    "input noise": ({"input_noise": np.zeros((5, 3, 8, 8))}, "no input noise"),
}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(nvae: Pipeline, name: str) -> None:
    arguments, reason = WRONG_ARGUMENTS[name]
    with pytest.raises(ValueError, match=reason):
        nvae.run(**{"images": bundles.images(1), **arguments})


def test_an_engine_that_breaks_its_declaration_is_an_error(nvae_bundle: Path, tmp_path: Path) -> None:
    """A bundle with right digests can still declare what its files do not do."""
    shutil.copytree(nvae_bundle, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "encode.onnx", tmp_path / "decode.onnx")
    Manifest.read(nvae_bundle).write(tmp_path)
    with Pipeline.load(tmp_path, "onnxruntime") as pipeline, pytest.raises(EngineError):
        pipeline.run(bundles.images(1))


def test_the_largest_engine_is_loaded_first(nvae_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(_name: str, file: Path, _options: EngineOptions) -> Any:
        loaded.append(file.stem)
        return None

    monkeypatch.setattr("handlers.runtimes.load", load)
    monkeypatch.setattr(memory, "LARGE_BYTES", 0)
    Pipeline.load(nvae_bundle, "onnxruntime")
    sizes = [memory.of_weights(nvae_bundle / f"{stage}.onnx") for stage in loaded]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1
