"""Files as people have them: each script prints a line a case, and exits with 1 if one of them is a fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize("script", ["checkpoints_in_the_wild"])
def test_no_case_is_a_fault(script: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(HERE / f"{script}.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    faults = [line for line in done.stdout.splitlines() if not line.startswith("ok ")]
    assert done.returncode == 0, "\n".join([*faults, done.stderr])
    assert "ok    control: " in done.stdout
