import dataclasses
import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.archive import ArchiveError, ArchiveSettings, build_archive, fitting_batch, fitting_queue
from handlers.manifest import BundleError, Manifest
from handlers.settings import HandlerSettings
from tests import bundles

pytest.importorskip("model_archiver")


def test_the_archive_holds_bundle_code_and_settings(nvae_bundle: Path, tmp_path: Path) -> None:
    archive = build_archive(nvae_bundle, tmp_path / "store", ArchiveSettings(batch_delay_ms=7, allow_seed=True))
    assert archive == tmp_path / "store" / "tiny.mar"
    with zipfile.ZipFile(archive) as content:
        names = set(content.namelist())
        model = json.loads(content.read("MAR-INF/MANIFEST.json"))["model"]
        settings = yaml.safe_load(content.read("model.yaml"))
        assert content.read("bundle/classify.onnx.data") == (nvae_bundle / "classify.onnx.data").read_bytes()
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in content.infolist())
    assert {f"bundle/{path.name}" for path in nvae_bundle.iterdir()} <= names
    assert {"torchserve.py", "handlers/pipeline.py", "handlers/runtimes/onnxruntime.py"} <= names
    assert not {"handlers/client.py", "handlers/reply.py"} & set(names)
    assert not any("__pycache__" in name or name.startswith(("mlvgm", "export")) for name in names)
    assert model == {"modelName": "tiny", "modelVersion": "1.0", "handler": "torchserve.py", "configFile": "model.yaml"}
    assert settings["batchSize"] == 2, "with 5 samples each, 2 requests fill an engine of 8"
    assert settings["maxBatchDelay"] == 7
    assert settings["jobQueueSize"] == 8, "four full calls of an engine"
    assert settings["handler"] == dataclasses.asdict(HandlerSettings(allow_seed=True))


def test_a_batch_is_what_an_engine_takes_at_once(nvae_bundle: Path) -> None:
    """For 5 samples of an image: 8 rows, but for one on a CPU where more gain nothing there."""
    manifest = Manifest.read(nvae_bundle)
    assert fitting_batch(manifest) == 2
    manifest = replace(manifest, batch=replace(manifest.batch, cpu=4))
    assert fitting_batch(manifest) == fitting_batch(manifest, "openvino") == 1
    assert fitting_batch(manifest, "tensorrt") == fitting_batch(replace(manifest, runtime="tensorrt")) == 2


def test_on_a_cpu_nobody_waits_for_more_than_sixteen_rows(nvae_bundle: Path) -> None:
    """For 5 samples of an image and an engine of 64 rows. What may wait is counted in full calls all the same."""
    manifest = Manifest.read(nvae_bundle)
    manifest = replace(manifest, batch=replace(manifest.batch, max=64, cpu=0))
    assert fitting_batch(manifest) == fitting_batch(manifest, "openvino") == 4
    assert fitting_batch(manifest, "tensorrt") == 13
    assert fitting_queue(manifest) == fitting_queue(manifest, batch_size=2) == 4 * 13
    assert fitting_queue(manifest, batch_size=20) == 4 * 20


def test_the_archive_runs_without_this_repository(style_bundle: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, with only the libraries installed: and neither torch nor our other packages are imported."""
    archive = build_archive(style_bundle, tmp_path / "store")
    with zipfile.ZipFile(archive) as content:
        content.extractall(tmp_path / "unpacked")
    program = """
import json, sys, types
blocked = ("torch", "mlvgm", "export", "deploy", "evaluation", "benchmarks", "onnx", "httpx")
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torchserve, handlers
from PIL import Image
import io
class Context:
    model_name, metrics = "tiny", types.SimpleNamespace(cache={})
    system_properties = {"model_dir": ".", "gpu_id": None}
    model_yaml_config = {"handler": {"runtime": "onnxruntime"}}
    def get_all_request_header(self, i): return {"Content-Type": "image/jpeg"}
    def set_response_status(self, code, phrase, i): self.status = code
    def set_response_content_type(self, i, value): pass
stream = io.BytesIO()
Image.new("RGB", (30, 20)).save(stream, "JPEG")
handler, context = torchserve.PurifierHandler(), Context()
handler.initialize(context)
body, = handler.handle([{"body": bytearray(stream.getvalue())}], context)
print(json.dumps([context.status, json.loads(body)["label"], handlers.__file__]))
"""
    (tmp_path / "program.py").write_text(program)
    environment = {"PYTHONPATH": str(tmp_path / "unpacked"), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, cwd=tmp_path / "unpacked", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, label, origin = json.loads(done.stdout)
    assert status == 200
    assert label in bundles.CLASSES
    assert Path(origin) == tmp_path / "unpacked" / "handlers" / "__init__.py"


def test_other_formats(nvae_bundle: Path, tmp_path: Path) -> None:
    packed = build_archive(nvae_bundle, tmp_path, archive_format="tgz")
    assert packed.name == "tiny.tar.gz"
    with tarfile.open(packed) as content:
        assert any(name.endswith("bundle/pipeline.json") for name in content.getnames())
    folder = build_archive(nvae_bundle, tmp_path, archive_format="no-archive")
    assert (folder / "bundle" / "pipeline.json").is_file()
    assert not (folder / "bundle" / "decode.onnx").is_symlink()
    assert build_archive(nvae_bundle, tmp_path, archive_format="no-archive") == folder


def test_an_old_archive_is_replaced_and_nothing_else_is_left(nvae_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.mar").write_bytes(b"old")
    build_archive(nvae_bundle, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.mar"]
    assert zipfile.is_zipfile(tmp_path / "tiny.mar")


def test_a_folder_of_the_same_name_in_tmp_survives(
    nvae_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archiver deletes $TMPDIR/<model name>."""
    precious = tmp_path / "tmp" / "tiny" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("x")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    build_archive(nvae_bundle, tmp_path / "store")
    assert precious.exists()


def test_odd_folder_names_do_no_harm(nvae_bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "a, b [c] *"
    assert zipfile.is_zipfile(build_archive(nvae_bundle, store))


def test_a_damaged_bundle_is_not_packed(tmp_path: Path) -> None:
    bundles.write_nvae(tmp_path / "bundle")
    (tmp_path / "bundle" / "decode.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"decode\.onnx"):
        build_archive(tmp_path / "bundle", tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"runtime": "cuda9"}, "runtime is 'cuda9', must be auto"),
        ({"batch_delay_ms": 0}, "batch_delay_ms is 0, must be a whole number from 1"),
        ({"batch_size": -1}, "batch_size is -1, must be a whole number from 0"),
    ],
)
def test_wrong_settings_are_refused(nvae_bundle: Path, tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_archive(nvae_bundle, tmp_path, ArchiveSettings(**settings))


def test_a_failing_archiver_is_one_error(nvae_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ArchiveError, match="torch-model-archiver failed"):
        build_archive(nvae_bundle, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_by_its_score_needs_a_threshold(nvae_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="mlvgm tune --score"):
        build_archive(nvae_bundle, tmp_path / "store", ArchiveSettings(suspicious="refuse"))
    assert not (tmp_path / "store").exists()
