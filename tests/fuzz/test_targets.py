"""The fuzz targets themselves: their seeds reach what they are to fuzz, and a short run passes."""

import subprocess
import sys

import pytest

from deploy.server import PROJECT
from handlers.image import decode
from tests.handlers.hostile import little_png

pytest.importorskip("atheris", reason="needs atheris: pip install '.[fuzz]'")


@pytest.mark.parametrize("target", ["request", "image"])
def test_a_short_run_passes(target: str) -> None:
    command = [sys.executable, "-m", f"tests.fuzz.{target}", "-runs=2000", "-seed=1"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Done 2000 runs" in done.stderr


def test_the_seeds_are_pictures() -> None:
    from tests.fuzz.image import seeds

    assert all(decode(seed, (8, 8)).shape == (8, 8, 3) for seed in [*seeds(), little_png()])


def test_the_seeds_are_requests() -> None:
    from tests.fuzz.request import request, seeds

    assert all(fields for fields, _ in map(request, seeds()))
