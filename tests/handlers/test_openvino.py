"""Rows shared out between cores come back in their order, whichever way a graph is compiled."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from handlers import runtimes
from handlers.runtimes import EngineError, Options

pytest.importorskip("openvino")
from handlers.runtimes import openvino

ROOT = Path(__file__).parents[2]


def inputs(rows: int) -> dict[str, np.ndarray]:
    """What the tiny NVAE's decoder takes, every row different; ``alphas`` belongs to all rows."""
    random = np.random.default_rng(0)
    shapes = {"feature_0": (2, 2, 2), "feature_1": (2, 4, 4), "noise_0": (2, 2, 2), "noise_1": (2, 4, 4)}
    drawn = {name: random.standard_normal((rows, *shape)).astype(np.float32) for name, shape in shapes.items()}
    return {**drawn, "alphas": np.array([0.25, 0.75], np.float32)}


@pytest.mark.parametrize("small", [True, False], ids=["for each number of rows", "dynamic"])
@pytest.mark.parametrize("threads", [1, 2])
def test_all_numbers_of_rows_agree_with_onnxruntime(
    nvae_bundle: Path, small: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(openvino, "SMALL_BYTES", 0)
    reference = runtimes.load("onnxruntime", nvae_bundle / "decode.onnx", Options(1))
    engine = openvino.load(nvae_bundle / "decode.onnx", Options(threads))
    assert isinstance(engine, openvino.StaticEngine if small else openvino.DynamicEngine)
    for rows in (1, 2, 3, 4, 2, 6):
        feeds = inputs(rows)
        found = engine.run(feeds)["images"]
        np.testing.assert_allclose(found, reference.run(feeds)["images"], rtol=1e-5, atol=1e-6)
    engine.close()


def test_a_wrong_shape_is_one_error_and_the_engine_goes_on(nvae_bundle: Path) -> None:
    engine = openvino.load(nvae_bundle / "decode.onnx", Options(2))
    with pytest.raises(EngineError):
        engine.run(inputs(2) | {"noise_1": np.zeros((2, 2, 3, 3), np.float32)})
    assert np.isfinite(engine.run(inputs(2))["images"]).all()


def test_it_calls_nobody() -> None:
    """OpenVINO's own telemetry, which a continuous integration turns off, would look up its host."""
    program = """
import sys
sys.addaudithook(lambda event, given: print(event, given) if event == "socket.getaddrinfo" else None)
import handlers.runtimes.openvino
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
