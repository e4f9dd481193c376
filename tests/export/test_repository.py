"""Model repositories: what Triton's, OpenVINO Model Server's and KServe's own formats say, and that the graph runs."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml

from export.archive import ArchiveError, ArchiveSettings, fitting_queue
from export.repository import Kind, build_repository
from export.single_graph import FOLDER, GRAPH, add_single_graph
from handlers.manifest import BundleError, Manifest, Samples
from handlers.pipeline import Pipeline
from mlvgm.cli.main import main
from tests import bundles

ort = pytest.importorskip("onnxruntime")

URI = "s3://bucket/models"
Run = Callable[[Path, npt.NDArray[np.uint8]], dict[str, npt.NDArray[Any]]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a graph of 3 samples, in which nothing is resampled: so its drawn noise changes no answer."""
    folder = tmp_path_factory.mktemp("repository") / "bundle"
    bundles.write_nvae(folder, default_alphas="none")
    add_single_graph(folder, 3)
    return folder


def in_onnx_runtime(model: Path, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
    session = ort.InferenceSession(str(model / "1" / GRAPH))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def in_openvino(model: Path, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
    """As OpenVINO Model Server is told to load it."""
    ov = pytest.importorskip("openvino")
    (listed,) = json.loads((model.parent / "config.json").read_text())["model_config_list"]
    file = model.parent / listed["config"]["base_path"] / "1" / GRAPH
    compiled = ov.Core().compile_model(str(file), "CPU", listed["config"]["plugin_config"])
    return {port.get_any_name(): array for port, array in compiled(images).items()}


@pytest.mark.parametrize("run", [in_onnx_runtime, in_openvino])
def test_the_graph_in_the_repository_answers_as_the_pipeline(run: Run, bundle: Path, tmp_path: Path) -> None:
    model = build_repository(bundle, tmp_path, "ovms", ArchiveSettings(threads=1))
    images = bundles.images(5)
    with Pipeline.load(bundle, "onnxruntime") as pipeline:
        expected = pipeline.run(images, 3)
    found = run(model, images)
    assert np.array_equal(found["label"], expected.labels)
    assert np.array_equal(found["votes"], expected.votes)
    assert np.allclose(found["mean_logits"], expected.logits, atol=1e-5)
    assert np.allclose(found["purified"], expected.purified, atol=1e-5)


def read_config(model: Path) -> Any:
    """By the protobuf that Triton's client ships."""
    protobuf = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient and grpcio")
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse((model / "config.pbtxt").read_text(), protobuf.ModelConfig())


def test_triton_is_told_names_types_and_shapes_of_the_graph(bundle: Path, tmp_path: Path) -> None:
    model = build_repository(bundle, tmp_path, "triton")
    config = read_config(model)
    types = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    session = ort.InferenceSession(str(model / "1" / GRAPH))
    for told, real in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [tensor.name for tensor in told] == [tensor.name for tensor in real]
        for tensor, port in zip(told, real, strict=True):
            assert tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name[types[port.type]].number == (
                tensor.data_type
            )
            # One number for each image: Triton has no tensor without axes, so that it is reshaped from one of length 1.
            shape = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
            assert ["B", *shape] == port.shape
            assert len(tensor.dims) > 0
            if tensor.name in ("votes", "mean_logits"):
                lines = (model / tensor.label_filename).read_text(encoding="utf-8").splitlines()
                assert lines == list(bundles.CLASSES)
    assert (config.name, config.backend) == (model.name, "onnxruntime")
    (warmup,) = config.model_warmup
    assert list(warmup.inputs["images"].dims) == list(config.input[0].dims)
    assert warmup.inputs["images"].data_type == config.input[0].data_type


def test_triton_is_told_how_to_batch(bundle: Path, tmp_path: Path) -> None:
    config = read_config(build_repository(bundle, tmp_path, "triton"))
    (group,) = config.instance_group
    fixed = dataclasses.replace(Manifest.read(bundle), samples=Samples(3, 8))
    assert config.max_batch_size == 3, "with 3 samples each, 3 images fill an engine of 8 rows"
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    policy = config.dynamic_batching.default_queue_policy
    assert policy.timeout_action == policy.REJECT
    assert (policy.default_timeout_microseconds, policy.max_queue_size) == (30_000_000, fitting_queue(fixed))
    assert (group.count, group.kind) == (1, group.KIND_AUTO)
    assert "intra_op_thread_count" not in config.parameters

    settings = ArchiveSettings("onnxruntime-cuda", threads=2, batch_size=5, batch_delay_ms=9, queue=7, max_wait_s=4)
    config = read_config(build_repository(bundle, tmp_path, "triton", settings, instances=2))
    policy, (group,) = config.dynamic_batching.default_queue_policy, config.instance_group
    assert (config.max_batch_size, config.dynamic_batching.max_queue_delay_microseconds) == (5, 9000)
    assert (policy.default_timeout_microseconds, policy.max_queue_size) == (4_000_000, 7)
    assert (group.count, group.kind) == (2, group.KIND_GPU)
    assert config.parameters["intra_op_thread_count"].string_value == "2"


def test_openvino_model_server_is_told_of_every_model(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    bundles.write_stylegan(other)
    add_single_graph(other, 2, "float32")
    out = tmp_path / "repository"
    for _ in range(2):
        build_repository(bundle, out, "ovms")
        build_repository(other, out, "ovms", ArchiveSettings("openvino", threads=3), instances=2)
    listed = [entry["config"] for entry in json.loads((out / "config.json").read_text())["model_config_list"]]
    assert [config["name"] for config in listed] == ["tiny", "tiny-style"]
    assert all((out / config["base_path"] / "1" / GRAPH).is_file() for config in listed)
    allowed = {"name", "base_path", "nireq", "plugin_config"}  # the server refuses what it does not know
    assert all(set(config) <= allowed for config in listed)
    assert listed[0]["plugin_config"] == {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "1"}
    assert listed[1]["plugin_config"]["INFERENCE_NUM_THREADS"] == "3"
    assert listed[1]["nireq"] == 2


KSERVE = os.environ.get("MLVGM_KSERVE", "")
PROGRAM = """
import json, sys
from kserve import V1beta1InferenceServiceSpec
from kserve.api_client import ApiClient

class Response:
    data = sys.stdin.read()

client = ApiClient()
spec = client.deserialize(Response, V1beta1InferenceServiceSpec)
print(json.dumps(client.sanitize_for_serialization(spec)))
"""


@pytest.mark.parametrize("server", ["triton", "openvino"])
def test_kserve_is_given_a_service_for_each_server(server: str, bundle: Path, tmp_path: Path) -> None:
    build_repository(bundle, tmp_path, "kserve", instances=2, storage_uri=f"{URI}/")
    service = yaml.safe_load((tmp_path / f"tiny-{server}.yaml").read_text())
    assert service["metadata"]["name"] == f"tiny-{server}"
    model = service["spec"]["predictor"]["model"]
    assert model["protocolVersion"] == "v2"
    if server == "triton":
        assert (model["runtime"], model["storageUri"]) == ("kserve-tritonserver", URI)
        assert read_config(tmp_path / "tiny").name == "tiny"
    else:
        assert (model["runtime"], model["storageUri"]) == ("kserve-openvino", f"{URI}/tiny")
        (plugin,) = [word.partition("=")[2] for word in model["args"] if word.startswith("--plugin_config=")]
        assert json.loads(plugin) == {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "2"}
    if KSERVE:  # an interpreter with the KServe SDK, whose classes keep what they know
        done = subprocess.run(
            [KSERVE, "-c", PROGRAM], input=json.dumps(service["spec"]), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["predictor"]["model"] == {"name": "", **model}


@pytest.mark.parametrize(
    ("name", "expected"), [("Road_Signs.v2", "road-signs-v2-triton"), ("2024", "m-2024-triton"), ("x" * 64, None)]
)
def test_a_service_has_a_name_that_kubernetes_takes(
    name: str, expected: str | None, bundle: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "bundle"
    shutil.copytree(bundle, renamed)
    dataclasses.replace(Manifest.read(renamed), name=name).write(renamed)
    build_repository(renamed, tmp_path / "out", "kserve", storage_uri=URI)
    given = yaml.safe_load((tmp_path / "out" / f"{name}-triton.yaml").read_text())["metadata"]["name"]
    assert given == (expected or given)
    assert len(f"{given}-predictor") <= 63


def test_name_version_and_digests_are_those_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    model = build_repository(bundle, tmp_path, "kserve", storage_uri=URI)
    manifest = Manifest.read(bundle)
    digest = hashlib.sha256((model / "pipeline.json").read_bytes()).hexdigest()
    for file in (GRAPH, f"{GRAPH}.data"):
        listed = manifest.files.get(f"{FOLDER}/{file}")
        assert (model / "1" / file).exists() == (listed is not None)
        if listed:
            assert hashlib.sha256((model / "1" / file).read_bytes()).hexdigest() == listed.sha256
    parameters = read_config(model).parameters
    assert parameters["mlvgm_version"].string_value == manifest.version
    assert parameters["mlvgm_manifest_sha256"].string_value == digest
    for server in ("triton", "openvino"):
        service = yaml.safe_load((tmp_path / f"tiny-{server}.yaml").read_text())
        assert service["metadata"]["annotations"] == {
            "mlvgm/bundle": manifest.name,
            "mlvgm/version": manifest.version,
            "mlvgm/manifest-sha256": digest,
        }


def test_another_bundle_is_the_next_version(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    model = build_repository(bundle, out, "triton")
    (model / "1" / GRAPH).write_bytes(b"damaged")
    build_repository(bundle, out, "triton")
    first = (model / "1" / GRAPH).read_bytes()
    assert first == (bundle / FOLDER / GRAPH).read_bytes()
    changed = tmp_path / "changed"
    shutil.copytree(bundle, changed)
    add_single_graph(changed, 2)
    build_repository(changed, out, "triton")
    assert sorted(path.name for path in model.iterdir()) == ["1", "2", "classes.txt", "config.pbtxt", "pipeline.json"]
    assert (model / "1" / GRAPH).read_bytes() == first
    assert (model / "2" / GRAPH).read_bytes() == (changed / FOLDER / GRAPH).read_bytes() != first


@pytest.mark.parametrize(
    ("kind", "settings", "uri", "words"),
    [
        ("triton", ArchiveSettings(certify_draws=5), "", "certify_draws cannot be set for triton"),
        ("ovms", ArchiveSettings(batch_size=5), "", "batch_size cannot be set for ovms"),
        ("kserve", ArchiveSettings(allow_seed=True), URI, "allow_seed cannot be set for kserve"),
        (
            "triton",
            ArchiveSettings("openvino"),
            "",
            "the runtime for triton is auto or onnxruntime or onnxruntime-cuda",
        ),
        ("ovms", ArchiveSettings("tensorrt"), "", "the runtime for ovms is auto or openvino"),
        ("triton", ArchiveSettings(), URI, "kserve, and no other format"),
        ("kserve", ArchiveSettings(), "", "kserve, and no other format"),
        ("kserve", ArchiveSettings(), "bucket/models", "should be like s3://bucket/models"),
        ("triton", ArchiveSettings(batch_size=-1), "", "batch_size is -1"),
    ],
)
def test_what_a_server_does_not_have_is_refused(
    kind: Kind, settings: ArchiveSettings, uri: str, words: str, bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError if "is -1" in words else ArchiveError, match=words):
        build_repository(bundle, tmp_path / "out", kind, settings, storage_uri=uri)
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_the_graph_or_damaged_is_refused(nvae_bundle: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"has no single graph: run mlvgm export --bundle .* --single-graph first"):
        build_repository(nvae_bundle, tmp_path / "out", "triton")
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    (broken / FOLDER / GRAPH).write_bytes(b"x")
    with pytest.raises(BundleError, match=GRAPH):
        build_repository(broken, tmp_path / "out", "triton")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"model_config_list": [{}]}', '{"model_config_list": 1}', "\xff"])
def test_a_foreign_configuration_is_left(content: str, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ArchiveError, match="no configuration of OpenVINO Model Server"):
        build_repository(bundle, tmp_path, "ovms")
    assert (tmp_path / "config.json").read_bytes() == content.encode("latin-1")


def test_the_command(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["archive", str(bundle), "--format", "triton", "--threads", "2", "--instances", "3"]) == 0
    assert capsys.readouterr().out.split() == ["model_repository/tiny"]
    assert read_config(Path("model_repository/tiny")).instance_group[0].count == 3
    assert main(["archive", str(bundle), "--format", "kserve", "--out", "cluster", "--storage-uri", URI]) == 0
    assert {path.name for path in Path("cluster").iterdir()} == {"tiny", "tiny-triton.yaml", "tiny-openvino.yaml"}
    capsys.readouterr()
    for words in (["--instances", "2"], ["--format", "ovms", "--certify-draws", "100"]):
        assert main(["archive", str(bundle), *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
