"""Archives that somebody altered: one error, and no more work than they are worth."""

import io
import json
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy import model_archive
from deploy.errors import CliError
from handlers.manifest import MAX_BYTES

MODEL = {"modelName": "m", "modelVersion": "1.0", "configFile": "model.yaml"}
YAML = "batchSize: 2\njobQueueSize: 20\nhandler: {runtime: torch}\n"


def manifest(**changes: object) -> str:
    return json.dumps({"model": MODEL | changes})


def write(path: Path, model: str | bytes = "", settings: str = YAML, pipeline: str | None = None) -> Path:
    files = {"MAR-INF/MANIFEST.json": model or manifest(), "model.yaml": settings}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in (
            files.items() if pipeline is None else [*files.items(), ("bundle/pipeline.json", pipeline)]
        ):
            zipped.writestr(name, content)
    return path


def test_a_whole_archive_is_read(tmp_path: Path) -> None:
    read = model_archive.read(write(tmp_path / "m.mar"))
    assert (read.name, read.version, read.batch_size, read.queue, read.runtime) == ("m", "1.0", 2, 20, "torch")


@pytest.mark.parametrize(
    "model",
    [
        "[]",
        "{}",
        "[" * 100_000,
        b"\xff\xfe{",
        *(manifest(modelName=name) for name in (None, 3, "", "../m", "a b", "m" * 65)),
        *(manifest(modelVersion=version) for version in (1.0, "", "1/0")),
    ],
)
def test_a_model_without_a_proper_name_is_refused(tmp_path: Path, model: str | bytes) -> None:
    with pytest.raises(CliError, match="damaged: build it again"):
        model_archive.read(write(tmp_path / "m.mar", model))


@pytest.mark.parametrize("number", ["-1", "0", "1.5", ".inf", ".nan", "x", "true", "[]", "9" * 5000])
@pytest.mark.parametrize("field", ["batchSize", "jobQueueSize"])
def test_settings_out_of_their_range_are_refused(tmp_path: Path, field: str, number: str) -> None:
    with pytest.raises(CliError, match="damaged: build it again"):
        model_archive.read(write(tmp_path / "m.mar", settings=f"{field}: {number}"))


@pytest.mark.parametrize("settings", ["[]", "handler: []", "handler: {runtime: [a]}", "\t", "!!python/object:os.x {}"])
def test_settings_of_another_kind_are_refused(tmp_path: Path, settings: str) -> None:
    with pytest.raises(CliError, match="damaged: build it again"):
        model_archive.read(write(tmp_path / "m.mar", settings=settings))


@pytest.mark.parametrize("pipeline", ["[]", "null", "{}", "[" * 100_000])
def test_a_bundle_that_is_none_is_refused(tmp_path: Path, pipeline: str) -> None:
    with pytest.raises(CliError, match="damaged: build it again"):
        model_archive.read(write(tmp_path / "m.mar", pipeline=pipeline))


def encrypted(data: bytes) -> bytes:
    """As the flags of the directory's entries say."""
    return data.replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0")


def of_unknown_method(data: bytes) -> bytes:
    return data.replace(b"\x08\0", b"\x63\0")


def with_other_bytes(data: bytes) -> bytes:
    place = data.index(b"MANIFEST.json") + len(b"MANIFEST.json") + 5
    return data[:place] + bytes(4) + data[place + 4 :]


@pytest.mark.parametrize("change", [encrypted, of_unknown_method, with_other_bytes, lambda data: data[:-10]])
def test_a_zip_file_that_cannot_be_read_is_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    archive = write(tmp_path / "m.mar")
    data = archive.read_bytes()
    assert change(data) != data
    archive.write_bytes(change(data))
    with pytest.raises(CliError, match="damaged: build it again"):
        model_archive.read(archive)


@pytest.mark.parametrize("format", ["mar", "tar.gz", "folder"])
def test_a_file_that_unpacks_to_gigabytes_is_not_held(tmp_path: Path, format: str) -> None:
    bomb, name = bytes(3 * MAX_BYTES), "MAR-INF/MANIFEST.json"
    archive = tmp_path / f"m.{format}"
    if format == "mar":
        write(archive, bomb)
    elif format == "tar.gz":
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            member = tarfile.TarInfo(f"m/{name}")
            member.size = len(bomb)
            tar.addfile(member, io.BytesIO(bomb))
    else:
        (archive / "MAR-INF").mkdir(parents=True)
        with (archive / name).open("wb") as stream:
            stream.truncate(len(bomb))
    tracemalloc.start()
    try:
        with pytest.raises(CliError, match="damaged: build it again"):
            model_archive.read(archive)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * MAX_BYTES
    finally:
        tracemalloc.stop()
