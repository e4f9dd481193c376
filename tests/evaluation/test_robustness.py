import json
from pathlib import Path

import numpy as np
import pytest

from evaluation import defences, report, robustness, robustness_report
from evaluation.attacks import predict
from handlers.pipeline import Pipeline
from tests import bundles
from tests.evaluation.models import linear, of_bundle

pytest.importorskip("foolbox")


@pytest.fixture(scope="module")
def content(nvae_bundle: Path) -> dict:
    images = bundles.images(12)
    classifier = of_bundle(nvae_bundle)
    labels = predict(classifier, images)
    labels[:2] = (labels[:2] + 1) % 3  # misread from the start
    with Pipeline.load(nvae_bundle, runtime="onnxruntime") as pipeline:
        table = robustness.compared(pipeline, 5, 0, "linear")
        found = robustness.measure(classifier, table, images, labels, ["deepfool", "cw"])
        found["noise"] = robustness.measure_noise(pipeline, images, labels, [0.25], 0, "linear")
    return found


def _report(content: dict) -> dict:
    rows = [{"l2": 0.5, **dict.fromkeys(("none", "transfer", "adaptive"), content["accuracy"]["none"]["clean"])}]
    return {
        "model": "tiny",
        "part": "test",
        "n": 12,
        "samples": 5,
        "schedule": "linear",
        "served": True,
        "sample_deviation": 0.0123,
        "alphas": [0.5, 1.0],
        "seed": 0,
        "runtime": "onnxruntime",
        "precision": "fp32",
        "machine": {"processor": "a processor", "cores": 2, "python": "3", "packages": {"torch": "2"}},
        "seconds": 1.0,
        "adaptive": {"n": 12, "steps": 1, "samples": 1, "bounds": rows},
        "caveats": ["One reason."],
        **content,
    }


def test_shares_of_the_bare_classifier(content: dict) -> None:
    assert content["accuracy"]["none"]["clean"]["count"] == 10
    for method in ("deepfool", "cw"):
        assert content["accuracy"]["none"][method]["count"] == 0
        assert content["attacks"][method]["fooled"] == defences.share(np.ones(10, np.bool_))
        assert content["attacks"][method]["engine_agrees"] == 1.0
        assert content["recovered"][method]["n"] == 10


def test_the_null_of_the_purifier(content: dict, nvae_bundle: Path) -> None:
    images = bundles.images(12)
    labels = predict(of_bundle(nvae_bundle), images)
    labels[:2] = (labels[:2] + 1) % 3
    with Pipeline.load(nvae_bundle, runtime="onnxruntime") as pipeline:
        kept = pipeline.run(images, samples=1, alphas=[0.0, 0.0]).labels
        linear = pipeline.run(images, samples=5, seeds=range(12), alphas="linear")
        spread = defences.sample_deviation(pipeline, images, 5, alphas="linear")
        assert defences.sample_deviation(pipeline, images, 5, alphas="none") < 1e-6
    accuracy = {name: row["clean"]["count"] for name, row in content["accuracy"].items()}
    assert accuracy["kept"] == (kept == labels).sum()
    assert accuracy["one"] == (linear.sample_labels[:, 0] == labels).sum()
    assert accuracy["linear"] == accuracy["purifier"] == (linear.labels == labels).sum()
    assert len({accuracy[name] for name in ("kept", "one", "purifier")}) > 1
    assert spread == pytest.approx(linear.purified.std(axis=1, ddof=1).mean(), rel=1e-5)


def test_noise_in_front(nvae_bundle: Path) -> None:
    images = bundles.images(12)
    with Pipeline.load(nvae_bundle, runtime="onnxruntime") as pipeline:
        labels = defences.bare(pipeline)(images).labels
        found = robustness.measure_noise(pipeline, images, labels, [0.0, 0.5], 0, "none")
        kept = defences.purifier(pipeline, 1, alphas="none")(images).labels
        noisy = defences.gaussian(images, 0.5, 0)
        read = defences.bare(pipeline)(noisy).labels
        purified = pipeline.run(noisy, samples=8, seeds=range(12), alphas="none").labels
    quiet, loud = found["sigmas"]
    assert (found["n"], found["draws"], found["samples"]) == (12, 48, 8)
    assert quiet["none"]["count"] == quiet["vote_none"]["count"] == 12
    assert quiet["purified"]["count"] == quiet["vote"]["count"] == (kept == labels).sum()
    assert loud["none"]["count"] == (read == labels).sum()
    assert loud["none"]["count"] < loud["vote_none"]["count"]
    assert loud["purified"]["count"] == (purified == labels).sum()


def test_gaussian_noise_is_of_the_size_asked_for() -> None:
    grey = np.full((4, 32, 32, 3), 128, np.uint8)
    noisy = defences.gaussian(grey, 0.12, 1)
    assert noisy.dtype == np.uint8
    assert (noisy / 255.0).std() == pytest.approx(0.12, abs=0.003)
    assert np.array_equal(noisy, defences.gaussian(grey, 0.12, 1))
    assert not np.array_equal(noisy, defences.gaussian(grey, 0.12, 2))
    assert defences.gaussian(np.full_like(grey, 255), 0.12, 1).min() > 60


def test_the_cache_is_where_it_is_asked_to_be() -> None:
    parser = robustness._parser()
    assert parser.parse_args(["--data", "x"]).cache == Path("build/attacks")
    assert parser.parse_args(["--data", "x", "--cache", "y"]).cache == Path("y")


def test_bounds_let_large_changes_not_count(content: dict) -> None:
    for method in ("deepfool", "cw"):
        counts = [row["none"]["count"] for row in content["within"][method]]
        assert counts == sorted(counts, reverse=True)
        largest = content["attacks"][method]["l2"]["0.95"]
        assert largest < 2.0
        assert counts[-1] == 0


def test_one_sample_lies_between_all_samples_and_any(content: dict) -> None:
    for found in content["per_sample"].values():
        assert found["all"]["share"] <= found["one"] <= 1


def test_a_sound_report_has_no_caveats_and_others_do(content: dict) -> None:
    # The boundaries of this classifier are nearer than one of its steps, so the first caveat is a real one.
    assert [caveat.partition(" ")[0] for caveat in robustness.caveats(content)] == ["Carlini-Wagner"]
    sound = json.loads(json.dumps(content))
    sound["attacks"]["cw"]["l2"]["0.5"] = sound["attacks"]["deepfool"]["l2"]["0.5"]
    assert robustness.caveats(sound) == []
    weak = json.loads(json.dumps(content))
    weak["attacks"]["deepfool"]["fooled"]["share"] = 0.9
    weak["attacks"]["cw"]["engine_agrees"] = 0.5
    weak["attacks"]["cw"]["l2"]["0.5"] = 99.0
    weak["adaptive"] = {"bounds": [{"l2": 1.0, "transfer": {"share": 0.2}, "adaptive": {"share": 0.4}}]}
    assert len(robustness.caveats(weak)) == 4


def test_weights_that_are_not_those_of_the_bundle_are_noticed(nvae_bundle: Path) -> None:
    images = bundles.images(12)
    other = linear(seed=5)
    with Pipeline.load(nvae_bundle, runtime="onnxruntime") as pipeline:
        table = {"none": defences.bare(pipeline), "purifier": defences.purifier(pipeline, 1)}
        content = robustness.measure(other, table, images, predict(other, images), ["deepfool"])
    assert "other weights" in " ".join(robustness.caveats(content))


def test_the_report_is_written_three_times(content: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "results" / "robustness.json"
    found = _report(content)
    report.save(found, robustness_report.markdown(found), path, lambda file: robustness_report.plot(found, file))
    assert json.loads(path.read_text())["n"] == 12
    text = path.with_suffix(".md").read_text()
    for words in ("Carlini-Wagner", "One reason.", "a processor", "83.3% (55.2-95.3)", "deviate by 0.0123"):
        assert words in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert rows[2:10] == [
        "no defence",
        "blur, sigma 1",
        "noise, vote of 5",
        "nothing resampled (all alphas 0)",
        "served schedule, one sample",
        "served schedule, vote of 5",
        "linear schedule, vote of 5",
        "served schedule, all 5 samples right",
    ]
    assert "another schedule, vote of 5" in robustness_report.markdown(
        {**found, "served": False, "schedule": "another"}
    )
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables if "DeepFool" in line or "deepfool" in line}) <= 3
