"""Bundles that somebody altered: the script prints a line a case, and exits with 1 if one of them is a fault."""

import os
import subprocess
import sys
from pathlib import Path

from export.bundle import export_bundle
from tests.export import models

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_no_altered_bundle_is_loaded(tmp_path: Path) -> None:
    export_bundle(models.recipe(), models.purifier(), models.classifier(), tmp_path / "tiny")
    command = [sys.executable, str(HERE / "bundles.py"), str(tmp_path / "tiny")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    control: " in done.stdout
