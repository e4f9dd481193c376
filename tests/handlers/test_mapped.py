"""Pages of a file are given back and can be read again; what was written to a private mapping stays."""

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from handlers.runtimes import Options, mapped

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
        mapped.forget(link)
        assert sum(resident(path)) == 0
        assert bytes(view) == content


def test_what_was_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(10_000))
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        view[5] = 1
        mapped.forget(path)
        assert view[5] == 1


def test_a_file_that_is_not_mapped_is_nothing(tmp_path: Path) -> None:
    mapped.forget(tmp_path / "none")


def test_a_large_model_holds_its_weights_once(nvae_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("handlers.runtimes.openvino")
    monkeypatch.setattr(openvino, "SMALL_BYTES", 0)
    engine = openvino.load(nvae_bundle / "classify.onnx", Options(1))
    images = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    first = engine.run({"images": images})["logits"].copy()
    assert sum(resident(nvae_bundle / "classify.onnx.data")) == 0
    assert np.array_equal(engine.run({"images": images})["logits"], first)
    engine.close()
