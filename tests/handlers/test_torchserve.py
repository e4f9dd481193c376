import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from deploy.server import DEPLOY
from handlers import torchserve
from handlers.fields import FieldError
from handlers.image import encode_png
from handlers.metrics import MEASURES, Measure
from handlers.score import ScoreThreshold
from handlers.torchserve import BUNDLE, FAILED, PROBE_HEADER, PurifierHandler, sink
from tests import bundles

MetricsCacheYamlImpl = pytest.importorskip("ts.metrics.metric_cache_yaml_impl").MetricsCacheYamlImpl


def metrics_cache(config: Path = DEPLOY / "metrics.yaml") -> Any:
    """TorchServe's own, as its workers make it of deploy/metrics.yaml."""
    cache = MetricsCacheYamlImpl(str(config))
    cache.initialize_cache()
    return cache


class Context:
    """What TorchServe hands to a handler, as strict about text as its wire format is."""

    def __init__(
        self, model_dir: Path, headers: list[dict[str, Any]], model_yaml: dict[str, Any] | None = None
    ) -> None:
        self.system_properties = {"model_dir": str(model_dir), "gpu_id": None}
        self.model_yaml_config = model_yaml or {"handler": {"runtime": "onnxruntime", "allow_seed": True}}
        self.headers = headers
        self.statuses: dict[int, int] = {}
        self.response_headers: dict[int, dict[str, str]] = {i: {} for i in range(len(headers))}
        self.model_name = "tiny"
        self.metrics = metrics_cache()

    def get_all_request_header(self, i: int) -> dict[str, Any]:
        return self.headers[i]

    def set_response_status(self, code: int, phrase: str, i: int) -> None:
        assert phrase.isascii()
        self.statuses[i] = code

    def set_response_content_type(self, i: int, value: str) -> None:
        self.set_response_header(i, "content-type", value)

    def set_response_header(self, i: int, name: str, value: str) -> None:
        assert (name + value).isascii()
        self.response_headers[i][name] = value


@pytest.fixture(scope="module")
def model_dir(nvae_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(nvae_bundle, folder / BUNDLE)
    return folder


@pytest.fixture(scope="module")
def handler(model_dir: Path) -> PurifierHandler:
    handler = PurifierHandler()
    handler.initialize(Context(model_dir, []))
    return handler


def test_a_mixed_batch(handler: PurifierHandler, model_dir: Path) -> None:
    image = bytearray(encode_png(np.full((3, 8, 8), 0.25, np.float32)))
    requests = [
        ({"body": image}, {"x-mlvgm-samples": "3"}),
        ({"data": image[:40]}, {}),
        ({"image": image}, {"Accept": "image/png", "image": {"content-type": "image/png"}}),
        ({"body": {"image": "\N{SNOWMAN}"}}, {"Content-Type": "application/json"}),
    ]
    context = Context(model_dir, [headers for _, headers in requests])
    bodies = handler.handle([fields for fields, _ in requests], context)
    assert len(bodies) == len(requests)
    assert context.statuses == {0: 200, 1: 400, 2: 200, 3: 400}
    assert [context.response_headers[i]["content-type"] for i in range(4)] == [
        "application/json",
        "application/json",
        "image/png",
        "application/json",
    ]
    assert json.loads(bodies[0])["samples"] == 3
    assert bodies[2].startswith(b"\x89PNG")
    assert json.loads(context.response_headers[2]["X-Mlvgm-Answer"])["samples"] == 5
    assert all(json.loads(bodies[i])["error"] for i in (1, 3))


def test_seeds_are_refused_unless_allowed(model_dir: Path) -> None:
    handler = PurifierHandler()
    handler.initialize(Context(model_dir, [], {"handler": {"runtime": "onnxruntime"}}))
    image = encode_png(np.full((3, 8, 8), 0.25, np.float32))
    context = Context(model_dir, [{"X-Mlvgm-Seed": "1"}])
    handler.handle([{"body": image}], context)
    assert context.statuses == {0: 400}


def test_a_damaged_bundle_keeps_the_worker_from_starting(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / BUNDLE / "decode.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"decode\.onnx"):
        PurifierHandler().initialize(Context(tmp_path, []))
    assert FAILED in caplog.text


def test_threads_of_the_environment_win(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(*arguments: object) -> None:
        seen.append(arguments[2])
        raise RuntimeError("enough")

    monkeypatch.setattr("handlers.torchserve.Pipeline.load", load)
    monkeypatch.setenv("MLVGM_THREADS", "3")
    with pytest.raises(RuntimeError, match="enough"):
        PurifierHandler().initialize(Context(model_dir, [], {"handler": {"threads": 2}}))
    assert seen == [3]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"allow_seeds": True}, r"no field 'allow_seeds'.*did you mean 'allow_seed'"),
        ({"allow_seed": "no"}, "allow_seed is 'no', must be true or false"),
        ({"threads": True}, "threads is True, must be a whole number"),
        ({"max_wait_s": 0}, "max_wait_s is 0, must be a whole number from 1"),
        ({"runtime": "openvno"}, r"runtime is 'openvno', .*did you mean 'openvino'"),
        ([1], r"must be a mapping with runtime, threads"),
    ],
)
def test_wrong_settings_are_named(model_dir: Path, settings: Any, reason: str) -> None:
    with pytest.raises(FieldError, match=f"^model yaml: handler: .*{reason}"):
        PurifierHandler().initialize(Context(model_dir, [], {"handler": settings}))


def test_class_names_beyond_ascii_survive(handler: PurifierHandler, model_dir: Path) -> None:
    assert any(not name.isascii() for name in bundles.CLASSES)
    images = bundles.images(8)
    context = Context(model_dir, [{"Accept": "image/png"}] * 8)
    handler.handle([{"body": encode_png(i.transpose(2, 0, 1).astype(np.float32) / 255)} for i in images], context)
    labels = {json.loads(headers["X-Mlvgm-Answer"])["label"] for headers in context.response_headers.values()}
    assert labels <= set(bundles.CLASSES)


def test_torchserve_is_told_of_every_measure() -> None:
    declared = yaml.safe_load((DEPLOY / "metrics.yaml").read_text())["model_metrics"]
    found = {
        (metric["name"], kind, metric["unit"], tuple(metric["dimensions"]))
        for kind, entries in declared.items()
        for metric in entries
    }
    assert found == {(m.name, m.kind, m.unit, (*filter(None, [m.label]), "ModelName")) for m in MEASURES}


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_a_line_of_a_measure_is_the_one_that_torchserve_would_write(
    measure: Measure, model_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1234.5)
    context, lines = Context(model_dir, []), list[str]()
    sink(context, lines)(measure, 0.012345678, "encode")
    (metric,) = [group[measure.name] for group in context.metrics.cache.values() if measure.name in group]
    values = {measure.label: "encode", "ModelName": "tiny"}
    with caplog.at_level("INFO"):
        metric.add_or_update(0.012346, [values[name] for name in metric.dimension_names])
    assert lines == [caplog.messages[-1]]


def test_what_a_batch_measures_is_one_record_of_the_log(
    handler: PurifierHandler, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = encode_png(np.full((3, 8, 8), 0.25, np.float32))
    both, probe = Context(model_dir, [{}, {PROBE_HEADER: "1"}]), Context(model_dir, [{PROBE_HEADER: "1"}])
    caplog.clear()
    with caplog.at_level("INFO"):
        handler.handle([{"body": image}] * 2, both)
    (record,) = caplog.messages
    lines = record.splitlines()
    assert all(line.startswith("[METRICS]mlvgm_") for line in lines)
    (answers,) = [line for line in lines if "mlvgm_answers" in line]
    assert ":1|#status:200,ModelName:tiny|" in answers, "a probe is not counted"
    with caplog.at_level("INFO"):
        caplog.clear()
        handler.handle([{"body": image}], probe)
    assert not caplog.messages


def test_a_probe_does_not_get_around_the_settings(tmp_path: Path) -> None:
    bundles.write_nvae(tmp_path / BUNDLE, score=ScoreThreshold(0.0, 0.5, 0.2, 0.8))
    context = Context(
        tmp_path, [{}, {PROBE_HEADER: "1"}], {"handler": {"runtime": "onnxruntime", "suspicious": "refuse"}}
    )
    handler = PurifierHandler()
    handler.initialize(context)
    image = encode_png(np.full((3, 8, 8), 0.25, np.float32))
    handler.handle([{"body": image}] * 2, context)
    assert context.statuses == {0: 422, 1: 422}


def test_what_is_not_declared_is_not_written(model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As under a TorchServe without our settings, or with another's."""
    config = tmp_path / "metrics.yaml"
    config.write_text("model_metrics: {histogram: [{name: mlvgm_stage_seconds, unit: s, dimensions: [rack]}]}")
    context, lines = Context(model_dir, []), list[str]()
    context.metrics = metrics_cache(config)
    with caplog.at_level("INFO"):
        write = sink(context, lines)
    assert "dimension rack" in caplog.text
    for measure in MEASURES:
        write(measure, 1, "x")
    assert not lines


def test_torchserve_finds_the_handler() -> None:
    from ts.utils.util import list_classes_from_module

    assert list_classes_from_module(torchserve) == [PurifierHandler], "it refuses a file that defines two classes"
