"""A shortened form of tests/stress/supervisor.py."""

import subprocess
import sys

from deploy.server import PROJECT


def test_the_supervisor_can_be_stopped_at_any_moment() -> None:
    words = ["-m", "tests.stress.supervisor", "--stops", "40", "--jobs", "2"]
    done = subprocess.run([sys.executable, *words], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
