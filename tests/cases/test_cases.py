"""Situations that users, their files and their clients bring: each script of this folder tries some, and says a line a
case, ``ok`` or ``FAULT``, with an exit code of 1 when there is a FAULT.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlvgm.cli.main import main

HERE = Path(__file__).parent
SCRIPTS = sorted(path.name for path in HERE.glob("*.py") if not path.name.startswith(("test_", "__")))
SERVERS = {"pair_faults.py", "grpc_streams.py"}
"""They start real servers, and take minutes."""
CONTROLLED = {"bundles.py", "callable_classifiers.py", "checkpoints_in_the_wild.py", "onnx_classifiers.py"}
"""They have controls, too: what nothing is wrong with must be taken."""
NOT_RUN = 2
"""The exit code of a script that lacks a program it needs."""


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with build/road-signs, which most scripts need."""
    folder = tmp_path_factory.mktemp("cases")
    assert main(["export", "--recipe", "road-signs", "--out", str(folder / "build" / "road-signs")]) == 0
    return folder


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.full) if name in SERVERS else name for name in SCRIPTS]
)
def test_every_case_is_ok(script: str, workplace: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [sys.executable, HERE / script], cwd=workplace, env=environment, capture_output=True, text=True
    )
    if done.returncode == NOT_RUN and script in SERVERS:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert script not in CONTROLLED or "ok    control: " in done.stdout
