"""Weights are in memory once: what a library has read is given back, and can be read again."""

import mmap
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

from handlers.runtimes import EngineOptions, memory

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def resident(file: Path) -> list[int]:
    """Kilobytes in memory of each mapping of ``file``."""
    found: list[int] = []
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split(None, 5)
        if not name.endswith(":"):
            ours = bool(values) and values[-1] == str(file.resolve())
        elif ours and name == "Rss:":
            found.append(int(values[0]))
    return found


def test_pages_come_back_when_they_are_read(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    path = tmp_path / "weights of a model"
    path.write_bytes(content)
    link = tmp_path / "link"
    link.symlink_to(path)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert bytes(view) == content
        assert sum(resident(path)) == len(content) // 1024
        memory.forget(link)
        assert sum(resident(path)) == 0
        assert bytes(view) == content


def test_what_was_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(10_000))
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        view[5] = 1
        memory.forget(path)
        assert view[5] == 1


def test_a_file_that_is_not_mapped_is_nothing(tmp_path: Path) -> None:
    memory.forget(tmp_path / "none")


def test_memory_is_given_back_while_weights_are_read_and_at_the_end() -> None:
    given: list[str] = []
    twice = threading.Event()

    def give_back() -> None:
        given.append(threading.current_thread().name)
        if len(given) == 2:
            twice.set()

    with memory.sparing(give_back):
        assert twice.wait(60)
    assert given[-1] == threading.current_thread().name != given[0]


def test_onnxruntime_peaks_at_little_more_than_the_weights(tmp_path: Path) -> None:
    file, count, channels = tmp_path / "large.onnx", 12, 512
    value = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(count)]
    ends = [value(f"x{i}", onnx.TensorProto.FLOAT, ["B", channels, None, None]) for i in (0, count)]
    weights = [np.full((channels, channels, 3, 3), i, np.float32) for i in range(count)]
    initializers = [onnx.numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(weights)]
    graph = onnx.helper.make_graph(nodes, "large", ends[:1], ends[1:], initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, file, save_as_external_data=True, location=f"{file.name}.data")
    program = f"""
from pathlib import Path
from handlers.runtimes import EngineOptions, onnxruntime
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
before = peak()
engine = onnxruntime.load(Path({str(file)!r}), EngineOptions(1))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.4 * sum(array.nbytes for array in weights)


def test_a_large_model_holds_its_weights_once(nvae_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("handlers.runtimes.openvino")
    monkeypatch.setattr(memory, "LARGE_BYTES", 0)
    engine = openvino.load(nvae_bundle / "classify.onnx", EngineOptions(1))
    images = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    first = engine.run({"images": images})["logits"].copy()
    assert sum(resident(nvae_bundle / "classify.onnx.data")) == 0
    assert np.array_equal(engine.run({"images": images})["logits"], first)
    engine.close()
