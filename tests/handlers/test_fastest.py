"""What "auto" is: the runtime that was measured to be faster and agrees with the other; else the usual one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handlers import cores, fastest, runtimes
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline
from handlers.runtimes import EngineError, cache, choice
from handlers.runtimes.choice import Choice
from tests import bundles

FIGURES = {"openvino": {"one image": 2.0, "a batch": 8.0}, "onnxruntime": {"one image": 1.0, "a batch": 4.0}}


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Milliseconds of each run, by runtime; to be changed."""
    times = {"openvino": [3.0, 2.0, 2.0], "onnxruntime": [1.0, 1.0]}
    monkeypatch.setattr(fastest, "_times", lambda pipeline, *_: times[pipeline.runtime])
    return times


def auto(bundle: Path) -> str:
    with Pipeline.load(bundle) as pipeline:
        return pipeline.runtime


def test_loading_takes_what_was_measured(nvae_bundle: Path, style_bundle: Path, times: dict[str, list[float]]) -> None:
    assert auto(nvae_bundle) == runtimes.choose("auto") == "openvino"
    made = fastest.measure(nvae_bundle)
    assert made == choice.kept(Manifest.read(nvae_bundle))
    assert (made.runtime, made.reason) == ("onnxruntime", "2.00 times as fast as openvino")
    assert auto(nvae_bundle) == "onnxruntime"
    assert auto(style_bundle) == "openvino", "another bundle"


def test_really_measured(nvae_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "_STEADY", 1e9)
    made = fastest.measure(nvae_bundle)
    assert made.milliseconds.keys() == {"openvino", "onnxruntime"}
    assert all(ms > 0 for found in made.milliseconds.values() for ms in found.values())
    assert auto(nvae_bundle) == made.runtime


def test_samples_that_fill_a_batch_alone(
    nvae_bundle: Path, times: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastest, "_ROWS", 1)
    assert fastest.measure(nvae_bundle).milliseconds["onnxruntime"] == {"one image": 1.0, "a batch": 1.0}


@pytest.mark.parametrize("change", ["cpu", "cores", "version"])
def test_it_holds_for_this_machine_and_these_libraries(
    nvae_bundle: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    manifest = Manifest.read(nvae_bundle)
    choice.keep(manifest, Choice("onnxruntime", "faster", FIGURES))
    assert choice.kept(manifest)
    monkeypatch.setattr(cores, "kind" if change == "cpu" else "usable", lambda: 77) if change != "version" else None
    if change == "version":
        monkeypatch.setattr(choice.packages, "version", lambda _: "0")
    assert choice.kept(manifest) is None
    assert auto(nvae_bundle) == "openvino"


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"runtime": "onnxruntime"}', None])
def test_what_cannot_be_read_is_not_taken(nvae_bundle: Path, content: bytes | None) -> None:
    manifest = Manifest.read(nvae_bundle)
    foreign = json.dumps({"runtime": "tensorrt", "reason": "", "milliseconds": {}}).encode()
    cache.write("choices", choice._key(manifest), foreign if content is None else content)
    assert choice.kept(manifest) is None


def test_a_busy_machine_measures_nothing(nvae_bundle: Path, times: dict[str, list[float]]) -> None:
    times["openvino"] = [2.0, 9.0, 9.0]
    made = fastest.measure(nvae_bundle)
    assert (made.runtime, made.reason) == ("openvino", "the machine was busy")
    assert choice.kept(Manifest.read(nvae_bundle)) is None


@pytest.mark.parametrize("wrong", [EngineError("refused"), 1.0])
def test_a_runtime_that_fails_or_disagrees_is_not_chosen(
    nvae_bundle: Path, times: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch, wrong: Exception | float
) -> None:
    times["openvino"] = [0.1, 0.1]
    run = Pipeline.run

    def other(pipeline: Pipeline, *given: Any, **named: Any) -> Any:
        result = run(pipeline, *given, **named)
        if pipeline.runtime == "openvino":
            if isinstance(wrong, Exception):
                raise wrong
            result.sample_logits[:] += wrong
        return result

    monkeypatch.setattr(Pipeline, "run", other)
    made = fastest.measure(nvae_bundle)
    assert (made.runtime, made.reason) == ("onnxruntime", "openvino fails")
    assert made.milliseconds["openvino"] == {}
    assert "openvino fails" in str(made)


def test_alone_a_runtime_is_not_measured(nvae_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "_AUTO", ("onnxruntime",))
    assert fastest.measure(nvae_bundle) == Choice("onnxruntime", "no other is installed", {})


@pytest.mark.parametrize(
    ("image", "batch", "runtime"),
    [(1.0, 4.0, "onnxruntime"), (1.95, 7.8, "openvino"), (1.0, 20.0, "openvino"), (4.0, 2.0, "onnxruntime")],
)
def test_a_faster_one_must_be_clearly_so(image: float, batch: float, runtime: str) -> None:
    found = {**FIGURES, "onnxruntime": {"one image": image, "a batch": batch}}
    assert fastest._chosen("openvino", found)[0] == runtime


def test_times_are_those_of_runs_after_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundles.write_nvae(tmp_path)
    monkeypatch.setattr(fastest, "_SECONDS", 0)
    counts = []
    run = Pipeline.run
    monkeypatch.setattr(Pipeline, "run", lambda *given: counts.append(np.shape(given[1])[0]) or run(*given))
    with Pipeline.load(tmp_path, "onnxruntime", 1) as pipeline:
        assert len(fastest._times(pipeline, 3, 2)) == 2
    assert counts == [3, 3, 3]


@pytest.mark.parametrize(("seconds", "is_long"), [(1e9, False), (0, True)])
def test_a_long_answer_is_measured_with_one_sample(
    nvae_bundle: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, is_long: bool
) -> None:
    monkeypatch.setattr(fastest, "_ANSWER_SECONDS", seconds)
    monkeypatch.setattr(fastest, "_SECONDS", 0)
    samples = []
    run = Pipeline.run
    monkeypatch.setattr(Pipeline, "run", lambda *given: samples.append(given[2]) or run(*given))
    typical = Manifest.read(nvae_bundle).samples.typical
    fastest.measure(nvae_bundle)
    assert typical > 1
    assert set(samples[2:]) == {1 if is_long else typical}
