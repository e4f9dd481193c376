"""What is kept comes back whole or not at all, from a folder that is this user's own, and takes bounded space."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from handlers.runtimes import cache

KEY = {"graph": "0", "rows": 1, "settings": {"threads": 2}}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "x"


def test_every_key_has_its_own_entry(folder: Path) -> None:
    assert cache.read("x", KEY) is None
    cache.write("x", KEY, b"first")
    cache.write("x", {**KEY, "rows": 2}, b"")
    assert cache.read("x", dict(reversed(KEY.items()))) == b"first"
    assert cache.read("x", {**KEY, "rows": 2}) == b""
    assert cache.read("y", KEY) is None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    cache.write("x", KEY, b"second")
    assert cache.read("x", KEY) == b"second"
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("length", [0, 10, 32, 40])
def test_a_damaged_entry_is_missing(folder: Path, length: int) -> None:
    cache.write("x", KEY, b"content of it")
    (entry,) = folder.iterdir()
    entry.write_bytes(entry.read_bytes()[:length])
    assert cache.read("x", KEY) is None


def test_a_pipe_in_the_place_of_an_entry_is_replaced(folder: Path) -> None:
    cache.write("x", KEY, b"first")
    (entry,) = folder.iterdir()
    entry.unlink()
    os.mkfifo(entry)
    assert cache.read("x", KEY) is None
    cache.write("x", KEY, b"second")
    assert cache.read("x", KEY) == b"second"


def test_a_folder_that_others_can_write_is_not_used(folder: Path) -> None:
    cache.write("x", KEY, b"content")
    folder.chmod(0o777)
    assert cache.read("x", KEY) is None
    cache.write("x", {}, b"content")
    assert len(list(folder.iterdir())) == 1


def test_without_a_folder_nothing_is_kept(folder: Path) -> None:
    folder.parent.parent.joinpath("cache").touch()
    cache.write("x", KEY, b"content")
    assert cache.read("x", KEY) is None


def test_what_was_not_used_for_longest_makes_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT_BYTES", 500)
    for i in range(3):
        cache.write("x", {"i": i}, bytes(100))
        for path in folder.iterdir():  # a minute passes
            os.utime(path, (path.stat().st_mtime - 60,) * 2)
    assert cache.read("x", {"i": 0})
    (folder / ".draft-of-a-killed-process").write_bytes(bytes(100))
    os.utime(folder / ".draft-of-a-killed-process", (0, 0))
    cache.write("x", {"i": 3}, bytes(150))
    assert [i for i in range(4) if cache.read("x", {"i": i})] == [0, 2, 3]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 600
    cache.write("x", {"i": 4}, bytes(501))
    assert [i for i in range(5) if cache.read("x", {"i": i})] == [0, 2, 3], "what is too large replaces nothing"


def test_a_folder_among_the_entries_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT_ENTRIES", 1)
    cache.write("x", {"i": 0}, b"")
    (folder / "mine").mkdir()
    os.utime(folder / "mine", (0, 0))
    cache.write("x", {"i": 1}, b"")
    assert [i for i in range(2) if cache.read("x", {"i": i}) is not None] == [1]
    assert (folder / "mine").is_dir()


def test_entries_are_few(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT_ENTRIES", 2)
    for i in range(5):
        cache.write("x", {"i": i}, b"")
        for path in folder.iterdir():  # a minute passes
            os.utime(path, (path.stat().st_mtime - 60,) * 2)
    assert [i for i in range(5) if cache.read("x", {"i": i}) is not None] == [3, 4]


def test_many_at_once_see_whole_entries(folder: Path) -> None:
    contents = [bytes([i]) * 200_000 for i in range(8)]

    def turn(i: int) -> bool:
        cache.write("x", KEY, contents[i % 8])
        return cache.read("x", KEY) in contents

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(turn, range(64)))
    assert len(list(folder.iterdir())) == 1, "no draft is left"
