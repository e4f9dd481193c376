"""Turns, taken by processes as workers take them."""

import fcntl
import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from handlers.turns import Turns

SPAWN = multiprocessing.get_context("spawn")


def take(folder: Path, taken: Event, done: Event) -> None:
    with Turns(folder):
        taken.set()
        done.wait(60)


def test_the_next_one_waits_until_the_turn_is_given_back(tmp_path: Path) -> None:
    first, second, done = SPAWN.Event(), SPAWN.Event(), SPAWN.Event()
    processes = [SPAWN.Process(target=take, args=(tmp_path, first, done))]
    processes[0].start()
    assert first.wait(60)
    processes.append(SPAWN.Process(target=take, args=(tmp_path, second, done)))
    processes[1].start()
    assert not second.wait(2)
    done.set()
    assert second.wait(60)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert not list(tmp_path.iterdir())


def test_a_killed_process_gives_its_turn_back(tmp_path: Path) -> None:
    taken, never = SPAWN.Event(), SPAWN.Event()
    process = SPAWN.Process(target=take, args=(tmp_path, taken, never))
    process.start()
    assert taken.wait(60)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    start = time.monotonic()
    with Turns(tmp_path):
        assert time.monotonic() - start < 5


def test_an_exception_gives_the_turn_back(tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockingIOError), Turns(tmp_path):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_no_folder_no_turns(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Turns(tmp_path / "missing")
