"""Bulk jobs on folders as they are in the wild: one row a file, whatever it is, and one answer an image, whatever ends
the job.
"""

import errno
import functools
import io
import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deploy.errors import CliError
from mlvgm.cli import bulk
from mlvgm.cli.bulk import Bulk, Row, print_row
from tests.machine import killed


def encoded(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def negate(images: Sequence[bytes]) -> list[tuple[bytes, Row] | str]:
    """The work: its answer tells the image apart."""
    outcomes: list[tuple[bytes, Row] | str] = []
    for image in images:
        try:
            shade = Image.open(io.BytesIO(image)).getpixel((0, 0))[0]  # type: ignore[index]
            outcomes.append((encoded(255 - shade), {"shade": shade}))
        except OSError:
            outcomes.append("not an image")
    return outcomes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images, two of them in a folder of their own."""
    for i, name in enumerate(("a.png", "b.PNG", "c.png", "deep/d.png", "deep/e.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(encoded(i))
    return tmp_path / "in"


def rows(folder: Path, *, settings: dict[str, Any] | None = None, work: bulk.Work = negate, **given: Any) -> list[Row]:
    given = {"files": [folder], "out": folder.parent / "out", "overwrite": False, "batch": 2} | given
    return list(Bulk(name="made", settings=settings or {"strength": 1}, **given).run(work))


def check(folder: Path, found: Sequence[Row]) -> None:
    """The five images have one answer each, the right one, and their PNGs are whole."""
    answers = [row for row in found if "error" not in row]
    names = ("a.png", "b.PNG", "c.png", "deep/d.png", "deep/e.png")
    assert sorted((row["file"], row["shade"]) for row in answers) == sorted(
        (str(folder / name), i) for i, name in enumerate(names)
    )
    for row in answers:
        with Image.open(row["made"]) as png:
            assert png.getpixel((0, 0))[0] == 255 - row["shade"]  # type: ignore[index]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(30 << 30)


ODD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "damaged": ("x.png", lambda path: path.write_bytes(b"no image"), "not an image"),
    "empty": ("x.png", lambda path: path.touch(), "not an image"),
    "pipe": ("x.png", fifo, "not a regular file"),
    "socket": ("x.png", listening, "not a regular file"),
    "device": ("x.png", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "huge": ("x.png", huge, "larger than 256 MiB"),
    "link to nothing": ("x.png", lambda path: path.symlink_to("nothing"), "No such file"),
    "link to itself": ("x.png", lambda path: path.symlink_to("x.png"), "Too many levels of symbolic links"),
    "name not UTF-8": (os.fsdecode(b"x\xff.png"), lambda path: path.write_bytes(encoded()), "not UTF-8"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_file_that_is_no_image_is_named_and_the_others_go_on(kind: str, folder: Path) -> None:
    name, make, reason = ODD[kind]
    make(folder / name)
    for _ in range(2):
        found = rows(folder)
        check(folder, found)
        (refusal,) = (row for row in found if "error" in row)
        assert reason in refusal["error"]
        assert "x" in Path(refusal["file"]).name
        json.dumps(refusal).encode("ascii")


@pytest.mark.parametrize("kind", ["pipe", "device", "link to nothing"])
def test_so_is_one_that_was_given_by_name(kind: str, tmp_path: Path) -> None:
    _, make, reason = ODD[kind]
    make(tmp_path / "x.png")
    (row,) = rows(tmp_path, files=[tmp_path / "x.png"], out=tmp_path / "out")
    assert reason in row["error"]


def test_names_stay_on_their_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "new\nline\x1b[2J.png").write_bytes(b"no image")
    (folder / "good\nline.png").write_bytes(encoded(9))
    found = rows(folder)
    assert {row.get("shade") for row in found} == {0, 1, 2, 3, 4, 9, None}
    for row in found:
        for as_json in (False, True):
            print_row(row, as_json, bulk.shown(row.get("made", "")))
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2 * len(found) - 1
    assert captured.err.count("\n") == 1
    assert "\x1b" not in captured.err


def test_the_longest_names(folder: Path) -> None:
    (folder / ("n" * 251 + ".png")).write_bytes(encoded(9))
    assert {row["shade"] for row in rows(folder)} == {0, 1, 2, 3, 4, 9}


def test_a_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: str, real: Callable[[str], Any] = os.scandir) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    (folder / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    found = rows(folder)
    check(folder, found)
    assert [row for row in found if "error" in row] == [
        {"file": str(folder / "locked"), "error": "Permission denied"},
    ]


def test_files_that_differ_in_their_ending_alone(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(encoded(9))
    (folder / "c.webp").write_bytes(b"no image")
    found = rows(folder)
    check(folder, [row for row in found if not row["file"].endswith("a.jpg")])
    made = {Path(row["made"]).name for row in found if "made" in row}
    assert made == {"a.jpg.png", "a.png.png", "b.png", "c.png.png", "d.png", "e.png"}


def test_two_files_that_would_become_one_are_refused(folder: Path) -> None:
    with pytest.raises(CliError, match="would both become"):
        rows(folder, files=[folder, folder / "a.png"])


def test_links_to_folders_are_not_followed(folder: Path) -> None:
    (folder / "deep" / "again").symlink_to(folder)
    check(folder, rows(folder))


def test_what_was_made_is_no_input(folder: Path) -> None:
    for _ in range(2):
        check(folder, rows(folder, out=folder / "out"))


def test_a_file_that_shrinks_or_vanishes_while_it_is_read(folder: Path) -> None:
    def work(images: Sequence[bytes]) -> list[tuple[bytes, Row] | str]:
        (folder / "deep" / "d.png").write_bytes(b"")
        (folder / "deep" / "e.png").unlink(missing_ok=True)
        return negate(images)

    found = rows(folder, work=work, batch=1)
    assert [row.get("error") for row in found] == [None, None, None, "not an image", "No such file or directory"]


def test_answers_that_are_there_come_again(folder: Path) -> None:
    first = rows(folder)
    assert rows(folder, work=lambda _: pytest.fail("there is no work left")) == first
    again = rows(folder, overwrite=True)
    assert again == first


def test_other_settings_are_told_apart(folder: Path) -> None:
    rows(folder)
    before = {path: path.read_bytes() for path in (folder.parent / "out").rglob("*.png")}
    with pytest.raises(CliError, match="other settings"):
        rows(folder, settings={"strength": 2})
    assert {path: path.read_bytes() for path in before} == before
    assert {row["settings"]["strength"] for row in rows(folder, settings={"strength": 2}, overwrite=True)} == {2}


def test_another_image_of_the_same_name_is_told_apart(folder: Path) -> None:
    rows(folder)
    (folder / "c.png").write_bytes(encoded(77))
    found = rows(folder)
    (refusal,) = (row for row in found if "error" in row)
    assert refusal["file"] == str(folder / "c.png")
    assert "not made from it" in refusal["error"]


@pytest.mark.parametrize("held", [b"mine", encoded(5)])
def test_a_foreign_file_in_the_place_of_a_png_is_left(held: bytes, folder: Path) -> None:
    out = folder.parent / "out"
    out.mkdir()
    (out / "a.png").write_bytes(held)
    found = rows(folder)
    assert "not made from it" in found[0]["error"]
    assert len(found) == 5
    assert (out / "a.png").read_bytes() == held
    check(folder, rows(folder, overwrite=True))


def test_a_folder_in_the_place_of_a_png(folder: Path) -> None:
    (folder.parent / "out" / "a.png").mkdir(parents=True)
    for overwrite in (False, True):
        found = rows(folder, overwrite=overwrite)
        assert [("error" in row) for row in found] == [True, False, False, False, False]


def test_two_jobs_do_not_write_to_one_folder(folder: Path) -> None:
    def work(images: Sequence[bytes]) -> list[tuple[bytes, Row] | str]:
        with pytest.raises(CliError, match="another job"):
            rows(folder, settings={"strength": 2}, overwrite=True)
        return negate(images)

    check(folder, rows(folder, work=work))


def test_a_full_disk_ends_the_job_and_it_goes_on_afterwards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CliError, match="No space left on device; the same command goes on from here"):
            rows(folder)
    out = folder.parent / "out"
    assert len(list(out.rglob("*.png"))) == 2
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".mlvgm-lock"]
    check(folder, rows(folder))


def test_no_image_at_all(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="no image"):
        rows(tmp_path)


def test_whatever_kills_it_and_when_every_image_has_one_answer(folder: Path) -> None:
    calls, cut_off = 0, True
    while cut_off:
        calls += 1
        out = folder.parent / f"out{calls}"
        cut_off = killed(functools.partial(rows, folder, out=out), calls)
        for png in out.rglob("*.png"):
            assert bulk._read_answer(png) is not None
        check(folder, rows(folder, out=out))
        assert [path.name for path in out.rglob(".*")] == [".mlvgm-lock"]
    assert calls > 20
