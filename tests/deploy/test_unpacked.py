"""Archives are unpacked once: what has not changed since is used again, and nothing else is."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy import unpacked
from deploy.errors import CliError

FILES = {"MAR-INF/MANIFEST.json": b"{}", "bundle/pipeline.json": b"[]", "bundle/x.onnx.data": bytes(range(256)) * 300}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write(tmp_path / "m.mar")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "archives"


def write(path: Path, compression: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as zipped:
        for name, content in {**FILES, **more}.items():
            zipped.writestr(name, content)
    return path


def content(folder: Path) -> dict[str, bytes]:
    """The files of ``folder`` but the record."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".unpacked.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.rglob("*")}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_second_time_nothing_is_unpacked(tmp_path: Path, store: Path, compression: int) -> None:
    archive = write(tmp_path / "m.mar", compression)
    unpacked.prepare(store, [archive])
    assert content(store / "m.mar") == FILES
    before = inodes(store)
    (store / "m.mar" / "__pycache__").mkdir()  # Python does, when it first runs what is there
    unpacked.prepare(store, [archive])
    assert before < inodes(store)


def rewrite(path: Path) -> None:
    """Change a byte of ``path``, and set its size and time back."""
    before, old = path.stat(), path.read_bytes()
    with path.open("r+b") as stream:
        stream.write(bytes([old[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: rewrite(folder / "bundle/x.onnx.data"),
        lambda folder: (folder / "bundle/pipeline.json").unlink(),
        lambda folder: (folder / ".unpacked.json").unlink(),
        lambda folder: (folder / ".unpacked.json").write_text("[]"),
        lambda folder: (folder / ".unpacked.json").write_text('{"files": {"'),
        shutil.rmtree,
        lambda folder: folder.rename(folder.with_name(".draft")),  # killed before it was done
    ],
)
def test_what_was_altered_since_is_unpacked_again(archive: Path, store: Path, change: Callable[[Path], None]) -> None:
    unpacked.prepare(store, [archive])
    change(store / "m.mar")
    unpacked.prepare(store, [archive])
    assert content(store / "m.mar") == FILES
    assert [path.name for path in store.iterdir()] == ["m.mar"]


def test_another_archive_is_unpacked(tmp_path: Path, archive: Path, store: Path) -> None:
    unpacked.prepare(store, [archive])
    os.replace(write(tmp_path / "new", more=b"1"), archive)
    unpacked.prepare(store, [archive])
    assert content(store / "m.mar") == {**FILES, "more": b"1"}
    unpacked.prepare(store, [write(tmp_path / "other.mar")])
    assert [path.name for path in store.iterdir()] == ["other.mar"]


def test_what_others_can_write_to_is_not_used(archive: Path, store: Path) -> None:
    unpacked.prepare(store, [archive])
    (store / "m.mar" / "planted.py").touch()
    store.chmod(0o777)
    unpacked.prepare(store, [archive])
    assert content(store / "m.mar") == FILES
    assert store.stat().st_mode & 0o777 == 0o700


def test_nothing_is_written_outside(tmp_path: Path, store: Path) -> None:
    archive = write(tmp_path / "m.mar", **{"../../outside": b"", f"{tmp_path}/absolute": b""})
    unpacked.prepare(store, [archive])
    assert {path.name for path in tmp_path.iterdir()} == {"m.mar", "archives"}


def test_folders_and_other_formats_are_links(tmp_path: Path, archive: Path, store: Path) -> None:
    """TorchServe takes them as they are."""
    folder, packed = tmp_path / "model", tmp_path / "model.tar.gz"
    folder.mkdir()
    (folder / "x").touch()
    packed.write_bytes(b"1")
    for _ in range(2):
        unpacked.prepare(store, [folder, packed, archive])
        assert {path.name: path.is_symlink() for path in store.iterdir()} == {
            "model": True,
            "model.tar.gz": True,
            "m.mar": False,
        }
    assert (store / "model").resolve() == folder
    unpacked.prepare(store, [archive])
    assert (folder / "x").exists()


def test_a_damaged_archive_is_one_error_and_leaves_nothing_to_use(archive: Path, store: Path) -> None:
    whole = archive.read_bytes()
    archive.write_bytes(whole.replace(bytes(range(256)), bytes(256), 1))
    for _ in range(2):
        with pytest.raises(CliError, match=r"m\.mar: damaged"):
            unpacked.prepare(store, [archive])
        assert not (store / "m.mar").exists()
    archive.write_bytes(whole)
    unpacked.prepare(store, [archive])
    assert content(store / "m.mar") == FILES


def test_a_full_disk_is_one_error(archive: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", full)
        with pytest.raises(CliError, match=r"cannot be unpacked into .*archives: No space left"):
            unpacked.prepare(store, [archive])
    assert not list(store.iterdir())


def test_what_does_not_fit_is_refused_before_the_disk_is_full(
    archive: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(archive)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=70_000))
    monkeypatch.setattr(zipfile.ZipFile, "extract", None)
    with pytest.raises(CliError, match=r"cannot be unpacked into .*archives: No space left"):
        unpacked.prepare(store, [archive])
    assert not list(store.iterdir())
