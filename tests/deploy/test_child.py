"""Programs as children: what they find, and that they end when we do."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy import signals
from deploy.child import Child
from deploy.output import Output
from deploy.server import PROJECT
from tests.deploy.pair import until

psutil = pytest.importorskip("psutil")


def test_its_lines_are_passed_on(tmp_path: Path) -> None:
    file = tmp_path / "log"
    output = Output(os.open(file, os.O_WRONLY | os.O_CREAT))
    child = Child(["/bin/sh", "-c", "echo one; echo two >&2; printf three"], output)
    assert child.wait(60)
    until(lambda: file.read_bytes() == b"one\ntwo\nthree\n")
    assert list(child.lines) == ["one", "two", "three"]


def test_it_finds_signals_as_usual_whatever_we_do_with_them(tmp_path: Path) -> None:
    with signals.noted(), (tmp_path / "log").open("wb") as log:
        child = Child(["/bin/cat", "/proc/self/status"], log)
        assert child.wait(60)
    status = dict(line.split(":\t", 1) for line in (tmp_path / "log").read_text().splitlines() if ":\t" in line)
    ours = sum(1 << number - 1 for number in (*signals.STOPS, signals.UPGRADE))
    assert int(status["SigBlk"], 16) & ours == int(status["SigIgn"], 16) & ours == 0


def test_what_it_has_left_behind_ends_with_it(tmp_path: Path) -> None:
    """A child that does not heed the signal, and one of its own."""
    with (tmp_path / "log").open("wb") as log:
        child = Child(["/bin/sh", "-c", "trap '' TERM; sleep 1000 & echo $!; wait"], log)
        until(lambda: (tmp_path / "log").read_text().strip() != "")
        orphan = psutil.Process(int((tmp_path / "log").read_text()))
        child.end(signal.SIGTERM, 0.2)
        assert child.ended()
    until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("dies_by", [0, signal.SIGTERM, signal.SIGKILL])
def test_it_ends_when_its_parent_is_killed(dies_by: int, tmp_path: Path) -> None:
    program = f"""
import sys, time
from deploy.child import Child
child = Child(["/bin/sleep", "1000"], open({str(tmp_path / "log")!r}, "wb"), {dies_by})
print(child.pid, flush=True)
time.sleep(1000)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = psutil.Process(int(parent.stdout.readline()))
    until(lambda: child.name() == "sleep")
    parent.kill()
    parent.wait()
    if dies_by:
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    else:
        assert child.is_running()
        child.kill()


def test_a_thread_that_ends_takes_no_child_with_it(tmp_path: Path) -> None:
    """The kernel goes by the thread that has started it."""
    started: list[Child] = []
    with (tmp_path / "log").open("wb") as log:
        thread = threading.Thread(target=lambda: started.append(Child(["/bin/sleep", "1000"], log, signal.SIGKILL)))
        thread.start()
        thread.join()
    child = psutil.Process(started[0].pid)
    until(lambda: child.name() == "sleep")
    assert not started[0].wait(0.5)
    started[0].end(signal.SIGKILL, 10)


def test_what_cannot_be_started_says_why(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        child = Child([str(tmp_path / "absent")], log)
        assert child.wait(60)
    assert (tmp_path / "log").read_text() == f"{tmp_path / 'absent'}: No such file or directory\n"
