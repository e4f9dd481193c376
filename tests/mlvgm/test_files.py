"""Files that are written whole or not at all, whatever ends the process, and locks on files that come and go."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mlvgm.files import locked, replacing, scratch
from tests.machine import killed


def write(file: Path, content: bytes = b"new") -> None:
    with replacing(file) as draft:
        draft.write_bytes(content)


def test_whatever_kills_it_and_when_the_old_or_the_new_is_there(tmp_path: Path) -> None:
    calls, cut_off = 0, True
    while cut_off:
        calls += 1
        file = tmp_path / str(calls) / "file.bin"
        file.parent.mkdir()
        file.write_bytes(b"old")
        cut_off = killed(lambda file=file: write(file), calls)  # type: ignore[misc]
        assert file.read_bytes() in (b"old", b"new")
        write(file, b"newer")
        assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == {"file.bin": b"newer"}
    assert calls > 3


def test_what_fails_leaves_the_old(tmp_path: Path) -> None:
    def interrupted() -> None:
        with replacing(tmp_path / "file") as draft:
            draft.write_bytes(b"ne")
            raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_a_pipe_is_replaced_and_a_folder_is_not(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_a_draft_belongs_to_one_writer(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as draft:
        draft.write_bytes(b"first")
        with pytest.raises(BlockingIOError):
            write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"first"


def test_folders_of_killed_processes_are_removed_and_those_at_work_are_not(tmp_path: Path) -> None:
    def work() -> None:
        with scratch(tmp_path) as folder:
            (folder / "new").mkdir()
            (folder / "new" / "file").touch()

    calls, left = 1, 0
    with scratch(tmp_path) as mine:
        while killed(work, calls):
            calls, left = calls + 1, max(left, len(list(tmp_path.iterdir())))
        work()
        assert list(tmp_path.iterdir()) == [mine]
    assert calls > 10
    assert left == 2  # at most one of them at a time
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_process_removes_at_once_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], tempfile.mkdtemp

    def removed(**given: Any) -> str:
        made.append(make(**given))
        if len(made) == 1:
            Path(made[0]).rmdir()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", removed)
    with scratch(tmp_path) as folder:
        assert str(folder) == made[1]


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had it removed it, or put another one there, between the opening of the file and the lock."""
    file, open_ = tmp_path / "lock", os.open
    for after in (Path.unlink, lambda path: (path.unlink(), path.write_bytes(b""))):

        def opened(path: Path, *rest: int, after: object = after) -> int:
            descriptor = open_(path, *rest)
            after(path)  # type: ignore[operator]
            return descriptor

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", opened)
            with pytest.raises(BlockingIOError), locked(file):
                pass
    with locked(file):
        pass
