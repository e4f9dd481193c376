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
        bare, simple = defences.bare(pipeline), {"blur": defences.blur(pipeline)}
        purifier = defences.purifier(pipeline, 5)
        return robustness.measure(classifier, bare, simple, purifier, images, labels, ["deepfool", "cw"])


def _report(content: dict) -> dict:
    rows = [{"l2": 0.5, **dict.fromkeys(("none", "transfer", "adaptive"), content["accuracy"]["none"]["clean"])}]
    return {
        "model": "tiny",
        "part": "test",
        "n": 12,
        "samples": 5,
        "schedule": "linear",
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
        bare, purifier = defences.bare(pipeline), defences.purifier(pipeline, 1)
        content = robustness.measure(other, bare, {}, purifier, images, predict(other, images), ["deepfool"])
    assert "other weights" in " ".join(robustness.caveats(content))


def test_the_report_is_written_three_times(content: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "results" / "robustness.json"
    found = _report(content)
    report.save(found, robustness_report.markdown(found), path, lambda file: robustness_report.plot(found, file))
    assert json.loads(path.read_text())["n"] == 12
    text = path.with_suffix(".md").read_text()
    for words in ("purifier, vote of 5", "Carlini-Wagner", "One reason.", "a processor", "83.3% (55.2-95.3)"):
        assert words in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables if "DeepFool" in line or "deepfool" in line}) <= 3
