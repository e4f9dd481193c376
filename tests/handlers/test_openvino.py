"""Rows shared out between cores come back in their order, whichever way a graph is compiled."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from handlers import runtimes
from handlers.runtimes import EngineError, EngineOptions, cache, memory

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
        monkeypatch.setattr(memory, "LARGE_BYTES", 0)
    reference = runtimes.load("onnxruntime", nvae_bundle / "decode.onnx", EngineOptions(1))
    engine = openvino.load(nvae_bundle / "decode.onnx", EngineOptions(threads))
    assert isinstance(engine, openvino.StaticEngine if small else openvino.DynamicEngine)
    for rows in (1, 2, 3, 4, 2, 6):
        feeds = inputs(rows)
        found = engine.run(feeds)["images"]
        np.testing.assert_allclose(found, reference.run(feeds)["images"], rtol=1e-5, atol=1e-6)
    engine.close()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of what OpenVINO has compiled."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    return tmp_path / "openvino"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every graph that is compiled."""
    calls: list[object] = []
    core = openvino.ov.Core

    class Core(core):  # type: ignore[misc, valid-type]
        def compile_model(self, *given: object) -> object:
            calls.append(given)
            return super().compile_model(*given)

    monkeypatch.setattr(openvino.ov, "Core", Core)
    return calls


def test_what_is_compiled_is_kept_for_later_starts(nvae_bundle: Path, kept: Path, compiled: list[object]) -> None:
    results = []
    for count in (3, 3, 6, 6):  # graphs that have been compiled so far
        other = count > 3
        engine = openvino.load(nvae_bundle / "decode.onnx", EngineOptions(1 if other else 2, digest="0"))
        results.append([engine.run(inputs(rows))["images"] for rows in (1, 2, 3)])
        engine.close()
        assert len(compiled) == len(list(kept.iterdir())) == count
    for found in results[1:]:
        for array, expected in zip(found, results[0], strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("damage", ["a byte", "the end", "another library's"])
def test_what_cannot_be_loaded_is_compiled_again(
    nvae_bundle: Path, kept: Path, compiled: list[object], damage: str
) -> None:
    def images() -> np.ndarray:
        return openvino.load(nvae_bundle / "decode.onnx", EngineOptions(1, digest="0")).run(inputs(1))["images"]

    expected = images()
    (entry,) = kept.iterdir()
    whole = entry.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    foreign = hashlib.sha256(b"what").digest() + b"what"
    entry.write_bytes({"a byte": flipped, "the end": whole[:-1], "another library's": foreign}[damage])
    assert np.array_equal(images(), expected)
    assert len(compiled) == 2
    assert np.array_equal(images(), expected)
    assert len(compiled) == 2


def test_nothing_is_kept_of_a_graph_without_a_digest_or_a_large_one(
    nvae_bundle: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino.load(nvae_bundle / "decode.onnx", EngineOptions(1))
    monkeypatch.setattr(memory, "LARGE_BYTES", 0)
    openvino.load(nvae_bundle / "decode.onnx", EngineOptions(1, digest="0"))
    assert not kept.exists()


def test_threads_get_their_own_answers(nvae_bundle: Path) -> None:
    engine = openvino.load(nvae_bundle / "decode.onnx", EngineOptions(2))
    given = [{**inputs(4), "alphas": np.array([share, share], np.float32)} for share in np.linspace(0, 1, 8)]
    expected = [engine.run(feeds)["images"] for feeds in given]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: engine.run(given[i % 8])["images"], range(200)))
    for i, images in enumerate(found):
        assert np.array_equal(images, expected[i % 8])


def test_a_wrong_shape_is_one_error_and_the_engine_goes_on(nvae_bundle: Path) -> None:
    engine = openvino.load(nvae_bundle / "decode.onnx", EngineOptions(2))
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
