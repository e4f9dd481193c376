import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from handlers import manifest
from handlers.manifest import FILE_NAME, BundleError, FileDigest, Manifest, Samples
from handlers.pipeline import Pipeline
from handlers.runtimes import cache
from handlers.score import ScoreThreshold
from tests import bundles

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def bundle(nvae_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nvae_bundle, tmp_path / "bundle"))


def change(bundle: Path, edit: Change) -> None:
    content = json.loads((bundle / FILE_NAME).read_text())
    edit(content)
    (bundle / FILE_NAME).write_text(json.dumps(content))


def refusal(bundle: Path) -> str:
    """The one-line reason for which the bundle is refused, by the manifest and so by the pipeline."""
    with pytest.raises(BundleError) as caught:
        Pipeline.load(bundle)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = bundles.write_nvae(tmp_path, report={"labels_equal": 1.0}, source={"torch": "2.13"})
    assert Manifest.read(tmp_path) == written
    assert set(written.files) == {"encode.onnx", "decode.onnx", "classify.onnx", "classify.onnx.data"}


def test_fields_on_disk_are_those_of_the_contract(nvae_bundle: Path) -> None:
    content = json.loads((nvae_bundle / FILE_NAME).read_text())
    assert content["format"] == 1
    assert content["noise_shapes"] == [[2, 2, 2], [2, 4, 4]]
    assert content["batch"] == {"min": 1, "opt": 4, "max": 8, "cpu": 0}
    assert content["stages"][0]["inputs"] == [{"name": "images", "dtype": "float32", "shape": ["B", 3, 8, 8]}]
    assert content["files"]["classify.onnx.data"].keys() == {"sha256", "bytes"}


def test_a_stage_may_have_a_fallback(half_bundle: Path, tmp_path: Path) -> None:
    assert [stage.fallback for stage in Manifest.read(half_bundle).stages] == ["encode.fp32.onnx", "", ""]
    bundle = Path(shutil.copytree(half_bundle, tmp_path / "half"))
    change(bundle, lambda m: m["stages"][1].update(fallback="absent.onnx"))
    assert "stage decode: its file 'absent.onnx' is not among the files" in refusal(bundle)


def test_bundles_from_before_there_were_fallbacks_are_read(bundle: Path) -> None:
    change(bundle, lambda m: [stage.pop("fallback") for stage in m["stages"]])
    assert [stage.fallback for stage in Manifest.read(bundle).stages] == ["", "", ""]


def test_writing_again_after_a_change_lists_the_new_content(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    (bundle / "report.md").write_text("parity")
    assert "report.md" in manifest.write(bundle).files
    Manifest.read(bundle)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    assert "not a bundle" in refusal(tmp_path)
    assert "not a bundle" in refusal(tmp_path / "absent")


@pytest.mark.parametrize("length", [0, 1, 100, 1000])
def test_a_truncated_manifest_is_refused(bundle: Path, length: int) -> None:
    text = (bundle / FILE_NAME).read_bytes()[:length]
    (bundle / FILE_NAME).write_bytes(text)
    assert "not valid JSON" in refusal(bundle)


def test_a_binary_manifest_is_refused(bundle: Path) -> None:
    (bundle / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(bundle)


@pytest.mark.parametrize("version", [0, 2, "1", True, None])
def test_another_format_is_refused(bundle: Path, version: object) -> None:
    change(bundle, lambda m: m.update(format=version))
    assert "format" in refusal(bundle)
    assert "export again" in refusal(bundle)


def test_one_altered_byte_is_refused(bundle: Path) -> None:
    path = bundle / "classify.onnx.data"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert "classify.onnx.data: its SHA-256 differs" in refusal(bundle)


def test_a_large_file_is_read_once_until_it_is_changed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_LARGE_BYTES", 10)
    monkeypatch.setenv(cache.VARIABLE, str(bundle.parent / "cache"))
    computed: list[Path] = []
    of = FileDigest.of
    monkeypatch.setattr(FileDigest, "of", lambda path: computed.append(path) or of(path))
    written = Manifest.read(bundle)
    assert len(computed) == len(written.files)
    assert Manifest.read(bundle) == written
    assert len(computed) == len(written.files)
    path = bundle / "classify.onnx.data"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        assert "classify.onnx.data: its SHA-256 differs" in refusal(bundle)
    content[100] ^= 1
    path.write_bytes(content)
    assert Manifest.read(bundle) == written


def test_a_truncated_file_is_refused(bundle: Path) -> None:
    path = bundle / "decode.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in refusal(bundle)


def test_a_missing_file_is_refused(bundle: Path) -> None:
    (bundle / "encode.onnx").unlink()
    assert "encode.onnx: missing" in refusal(bundle)


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", "", "..\\secret", "C:secret"])
def test_paths_out_of_the_bundle_are_refused(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("x")
    change(bundle, lambda m: m["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert "outside the bundle" in refusal(bundle)


def test_a_link_out_of_the_bundle_is_refused(bundle: Path) -> None:
    (bundle / "encode.onnx").rename(bundle.parent / "encode.onnx")
    (bundle / "encode.onnx").symlink_to(bundle.parent / "encode.onnx")
    assert "outside the bundle" in refusal(bundle)


EDITS: dict[str, tuple[Change, str]] = {
    "weights missing": (lambda m: m["alphas"].update(linear=[0.5]), "1 weights for 2 latents"),
    "weight out of range": (
        lambda m: m["alphas"].update(linear=[0.5, 1.5]),
        "alphas.linear[1] is 1.5, must be a number from 0 to 1",
    ),
    "weight NaN": (lambda m: m["alphas"].update(linear=[0.5, float("nan")]), "must be a number"),
    "no such schedule": (lambda m: m.update(default_alphas="sine"), "'sine' is not among"),
    "samples": (lambda m: m["samples"].update(default=99), "samples: must have 1 <= default <= max"),
    "batch": (lambda m: m["batch"].update(min=9), "batch: must have 1 <= min <= opt <= max"),
    "batch for CPUs": (lambda m: m["batch"].update(cpu=9), "cpu is 9, must lie between min and max"),
    "batch has a text": (lambda m: m["batch"].update(min="1"), "batch.min is '1', must be a whole number"),
    "class twice": (lambda m: m.update(classes=["a", "a", "b"]), "a name twice"),
    "too few classes": (lambda m: m.update(classes=["a", "b"]), "classify"),
    "image size": (lambda m: m.update(image_size=[16, 16]), "encode: input images"),
    "three sizes": (lambda m: m.update(image_size=[16, 16, 3]), "image_size"),
    "noise shape": (lambda m: m["noise_shapes"].__setitem__(0, [3, 2, 2]), "noise_0"),
    "name": (lambda m: m.update(name="../x"), "name"),
    "input noise": (lambda m: m.update(input_noise_l2=1.0), "disagree"),
    "no stages": (lambda m: m.update(stages=[]), "stages is []"),
    "order of stages": (lambda m: m["stages"].insert(0, m["stages"].pop(1)), "nothing provides"),
    "stage name of a metric's syntax": (lambda m: m["stages"][0].update(name="a,b|#c:d"), "stages[0].name is"),
    "stage without name": (lambda m: m["stages"][0].update(name=""), "stages[0].name is"),
    "stage twice": (lambda m: m["stages"].insert(0, m["stages"][0]), "same name"),
    "stage without file": (lambda m: m["stages"][0].update(file="other.onnx"), "not among the files"),
    "stage with unknown input": (lambda m: m["stages"][0]["inputs"][0].update(name="pixels"), "'pixels'"),
    "stage of other type": (lambda m: m["stages"][1]["inputs"][0].update(dtype="float16"), "feature_0 float16"),
    "unknown type": (lambda m: m["stages"][1]["inputs"][0].update(dtype="float31"), "float31"),
    "unknown field": (lambda m: m.update(extra=1), "there is no field 'extra'"),
    "missing field": (lambda m: m.pop("classes"), "classes is missing"),
    "no SHA-256": (lambda m: m["files"]["encode.onnx"].update(sha256="beef"), "64 hexadecimal digits"),
    "list for object": (lambda m: m.update(files=[]), "files is [], must be a mapping"),
}


@pytest.mark.parametrize("name", EDITS)
def test_contradictions_are_refused(bundle: Path, name: str) -> None:
    edit, reason = EDITS[name]
    change(bundle, edit)
    assert reason in refusal(bundle)


@pytest.mark.parametrize("name", ["notes.txt", "more/weights.data", ".hidden"])
def test_what_the_manifest_does_not_list_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("x")
    assert f"{name}: not a file of this bundle" in refusal(bundle)


@pytest.mark.parametrize("kind", ["pipe", "dangling link", "link to a folder"])
def test_what_is_no_file_is_refused_unopened(bundle: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(bundle / "other")
    else:
        (bundle / "other").symlink_to(bundle.parent if kind == "link to a folder" else "absent")
    assert "other: not a file of this bundle" in refusal(bundle)


def test_a_pipe_in_the_place_of_the_manifest_is_refused_unopened(bundle: Path) -> None:
    (bundle / FILE_NAME).unlink()
    os.mkfifo(bundle / FILE_NAME)
    assert "not a bundle" in refusal(bundle)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_a_folder_that_no_file_system_can_name(path: str) -> None:
    with pytest.raises(BundleError):
        Manifest.read(path)


NUMBERS = ("1" * 5000, "1e999", "-1", "1.5", "true", "9" * 400, "[" * 50_000 + "]" * 50_000)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:6])
@pytest.mark.parametrize("field", ['"bytes": ', '"max": ', '"input_noise_l2": ', '"format": '])
def test_numbers_without_bound_are_refused(bundle: Path, field: str, number: str) -> None:
    text = (bundle / FILE_NAME).read_text()
    (bundle / FILE_NAME).write_text(re.sub(rf"{field}[\d.]+", f"{field}{number}", text, count=1))
    if (field, number) != ('"input_noise_l2": ', "1.5"):
        assert refusal(bundle)


def test_nothing_inconsistent_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="default_alphas"):
        bundles.write_nvae(tmp_path, default_alphas="sine")
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize(("default", "typical"), [(5, 5), ("auto", 2)])
def test_samples_may_be_left_to_the_vote(tmp_path: Path, default: Any, typical: int) -> None:
    bundles.write_nvae(tmp_path, samples=Samples(default, 16))
    samples = Manifest.read(tmp_path).samples
    assert (samples.default, samples.max, samples.typical) == (default, 16, typical)


@pytest.mark.parametrize(("default", "most"), [("all", 16), (0, 16), (17, 16), ("auto", 0)])
def test_samples_without_sense_are_refused(bundle: Path, default: int | str, most: int) -> None:
    change(bundle, lambda content: content.update(samples={"default": default, "max": most}))
    assert "samples" in refusal(bundle)


def test_a_threshold_of_the_score_is_kept(tmp_path: Path) -> None:
    threshold = ScoreThreshold(1.5, 0.01, 0.004, 0.018)
    assert bundles.write_nvae(tmp_path).score is None
    bundles.write_nvae(tmp_path, score=threshold)
    assert Manifest.read(tmp_path).score == threshold


def test_a_bundle_from_before_there_was_a_score_is_read(bundle: Path) -> None:
    change(bundle, lambda content: content.pop("score"))
    assert Manifest.read(bundle).score is None


@pytest.mark.parametrize("wrong", [{"threshold": 1}, {"threshold": -1, "false_alarms": 0.1, "low": 0, "high": 1}, 3])
def test_a_wrong_threshold_is_refused(bundle: Path, wrong: Any) -> None:
    change(bundle, lambda content: content.update(score=wrong))
    with pytest.raises(BundleError, match="score"):
        Manifest.read(bundle)
