"""Weights beside a graph give the numbers of weights in it."""

from pathlib import Path

import numpy as np
import pytest

from export import onnx_graph
from handlers import runtimes
from handlers.runtimes import EngineOptions


def test_large_weights_lie_beside_the_graph(nvae_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [nvae_bundle / "classify.onnx"]
    for i, limit in enumerate((1_000_000, 0, 0, 1_000_000)):
        monkeypatch.setattr(onnx_graph, "INLINE_BYTES", limit)
        files.append(tmp_path / f"{i}.onnx")
        onnx_graph.save_graph(onnx_graph.load_graph(files[-2]), files[-1])
    assert [file.with_name(f"{file.name}.data").is_file() for file in files[1:]] == [False, True, True, False]
    images = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    for name in runtimes.ON_CPU:
        logits = [runtimes.load(name, file, EngineOptions(1)).run({"images": images})["logits"] for file in files]
        assert all(np.array_equal(found, logits[0]) for found in logits)
