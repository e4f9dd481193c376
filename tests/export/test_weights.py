"""Weights in half precision: smaller files, answers within the limit, and what half cannot hold stays fp32."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.onnx_graph import save_graph
from export.weights import SMALL, halve
from handlers import runtimes
from handlers.runtimes import EngineOptions, memory

HALF = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
SIDE = 64  # of the weights: SIDE * SIDE numbers are SMALL


def chain(*weights: np.ndarray, opset: int = 18) -> ir.Model:
    """images (B, 64) times every one of ``weights``, w0, w1, ..., and plus a vector."""
    nodes = [onnx.helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(len(weights))]
    nodes.append(onnx.helper.make_node("Add", [f"x{len(weights)}", "b"], ["y"]))
    tensors = {**{f"w{i}": array for i, array in enumerate(weights)}, "b": np.ones(weights[-1].shape[1], np.float32)}
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", size])
        for name, size in (("x0", weights[0].shape[0]), ("y", weights[-1].shape[1]))
    ]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "chain", ends[:1], ends[1:], initializers)
    opsets = [onnx.helper.make_opsetid("", opset)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8))


def drawn(*shape: int, scale: float = 0.1) -> np.ndarray:
    return (scale * np.random.default_rng(len(shape)).standard_normal(shape)).astype(np.float32)


def types(file: Path) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in onnx.load(file, load_external_data=False).graph.initializer}


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("large", [False, True], ids=["inline", "mapped"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_compute_with_the_rounded_weights(
    kind: str, large: bool, runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32: the products are those of fp32 numbers, whether the widened weights are in memory or in a file."""
    monkeypatch.setattr("export.onnx_graph.INLINE_BYTES", 0 if large else 10**9)
    monkeypatch.setattr(memory, "LARGE_BYTES", 0 if large else 10**9)
    weights = drawn(SIDE, SIDE), drawn(SIDE, 2 * SIDE)
    model = chain(*weights)
    assert halve(model, kind) == {}
    file = tmp_path / "chain.onnx"
    save_graph(model, file)
    assert (memory.external(file).exists(), types(file)) == (
        large,
        {"w0": HALF[kind], "w1": HALF[kind], "b": onnx.TensorProto.FLOAT},
    )
    onnx.checker.check_model(str(file), full_check=True)
    half = ir.DataType[{"fp16": "FLOAT16", "bf16": "BFLOAT16"}[kind]].numpy()
    images = drawn(3, SIDE)
    expected = images
    for array in weights:
        expected = expected @ array.astype(half).astype(np.float32)
    engine = runtimes.load(runtime, file, EngineOptions(1))
    for rows in (3, 1):
        found = engine.run({"x0": images[:rows]})["y"]
        np.testing.assert_allclose(found, expected[:rows] + 1, rtol=1e-5, atol=1e-6)
    engine.close()


@pytest.mark.parametrize(
    ("kind", "weight", "reason"),
    [
        ("fp16", np.full((SIDE, SIDE), 1e5), r"its largest number, 1.0e\+05, is beyond fp16"),
        ("fp16", drawn(SIDE, SIDE, scale=1e-8), "its numbers are too small for fp16, which would change them by"),
        ("bf16", np.full((SIDE, SIDE), 3.4e38), r"its largest number, 3.4e\+38, is beyond bf16"),
        ("bf16", np.full((SIDE, SIDE), np.nan), "its largest number, nan, is beyond bf16"),
    ],
)
def test_what_half_precision_cannot_hold_stays_fp32(kind: str, weight: np.ndarray, reason: str, tmp_path: Path) -> None:
    model = chain(weight.astype(np.float32), drawn(SIDE, SIDE))
    kept = halve(model, kind)
    assert list(kept) == ["w0"]
    assert re.match(reason, kept["w0"])
    save_graph(model, tmp_path / "chain.onnx")
    assert types(tmp_path / "chain.onnx") == {"w0": 1, "w1": HALF[kind], "b": 1}


def test_small_ones_old_graphs_and_outputs_are_left_alone() -> None:
    assert halve(chain(drawn(SMALL // 2, 2), drawn(2, SMALL // 4)), "fp16") == {}
    small = chain(drawn(SIDE, SIDE - 1))
    halve(small, "fp16")
    assert small.graph.initializers["w0"].dtype == ir.DataType.FLOAT
    old = chain(drawn(SIDE, SIDE), opset=12)
    assert halve(old, "bf16") == {"w0": "its graph is of an opset before 13, which cannot cast bf16"}
    assert halve(old, "fp16") == {}


@pytest.mark.parametrize("kind", HALF)
def test_weights_are_judged_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a copy of a whole one: the largest of `celeba-identities` has 2 GB."""
    monkeypatch.setattr("export.weights._CHUNK", 1 << 14)
    array = drawn(1024, 1024)
    model = chain(array)
    model.graph.initializers["w0"].const_value = ir.tensor(array)
    tracemalloc.start()
    try:
        assert halve(model, kind) == {}
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize(("value", "reason"), [(1e6, "beyond fp16"), (np.nan, "beyond fp16")])
def test_every_part_is_judged(value: float, reason: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.weights._CHUNK", 1000)
    large = drawn(SIDE, SIDE)
    large.flat[place] = value
    assert reason in halve(chain(large), "fp16")["w0"]
