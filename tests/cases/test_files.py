"""Files as people have them: each script prints a line a case, and exits with 1 if one of them is a fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.bundle import export_bundle
from tests.export import models

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(script: str, *arguments: object) -> None:
    command = [sys.executable, str(HERE / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    faults = [line for line in done.stdout.splitlines() if not line.startswith("ok ")]
    assert done.returncode == 0, "\n".join([*faults, done.stderr])
    assert "ok    control: " in done.stdout


@pytest.mark.parametrize("script", ["checkpoints_in_the_wild", "callable_classifiers", "onnx_classifiers"])
def test_no_case_is_a_fault(script: str) -> None:
    run(script)


def test_no_altered_bundle_is_loaded(tmp_path: Path) -> None:
    export_bundle(models.recipe(), models.purifier(), models.classifier(), tmp_path / "tiny")
    run("bundles", tmp_path / "tiny")
