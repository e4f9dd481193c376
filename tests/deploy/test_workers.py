import json
from pathlib import Path

import pytest

from deploy import workers
from deploy.workers import chosen, sizes_of
from handlers import cores
from tests import bundles
from tests.handlers.test_cores import grant

SMALL, LARGE = 20_000_000, 1_300_000_000


@pytest.mark.parametrize(
    ("usable", "sizes", "gigabytes", "expected"),
    [
        (2, [SMALL], 64, (3, 1)),
        (2, [LARGE], 64, (1, 0)),
        (2, [SMALL], 1, (1, 0)),
        (15, [LARGE], 64, (1, 0)),
        (16, [SMALL], 64, (9, 2)),
        (2, [SMALL], 5.4, (3, 1)),
        (8, [SMALL], 5.4, (3, 2)),
        (1, [SMALL], 64, (2, 0)),
        (2, [SMALL, SMALL], 64, (2, 0)),
        (16, [LARGE], 64, (2, 8)),
        (64, [SMALL], 64, (9, 8)),
        (64, [SMALL, SMALL], 64, (9, 4)),
        (64, [LARGE], 12, (2, 32)),
        (64, [LARGE], 0.1, (1, 0)),
    ],
)
def test_what_suits_a_machine(
    usable: int, sizes: list[int], gigabytes: float, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable", lambda: usable)
    monkeypatch.setattr(workers, "available_memory", lambda: gigabytes * 1e9)
    monkeypatch.delenv("MLVGM_THREADS", raising=False)
    assert chosen(None, 0, sizes) == expected


@pytest.mark.parametrize(
    ("given", "threads", "environment", "expected"),
    [(1, 0, None, (1, 0)), (3, 0, None, (3, 2)), (3, 8, None, (3, 8)), (3, 0, "5", (3, 0)), (3, 8, "5", (3, 8))],
)
def test_what_is_given_counts(
    given: int, threads: int, environment: str | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable", lambda: 6)
    monkeypatch.delenv("MLVGM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("MLVGM_THREADS", environment)
    assert chosen(given, threads, [SMALL]) == expected


def test_an_archive_that_is_missing_is_for_the_server_to_say(tmp_path: Path) -> None:
    (tmp_path / "a.mar").write_bytes(b"12345")
    assert sizes_of([tmp_path / "a.mar", tmp_path / "absent.mar"]) == [5, 0]


def test_memory_is_what_the_container_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"pod/memory.max": "900\n", "pod/memory.current": "200\n", "pod/box/memory.max": "max\n"}
    grant(monkeypatch, tmp_path, "0::/pod/box\n", files)
    assert workers.available_memory() == 700


def unpacked_archive(folder: Path, runtime: str, of_bundle: str) -> Path:
    (folder / "MAR-INF").mkdir(parents=True)
    model = {"modelName": folder.name, "configFile": "model.yaml"}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": model}))
    (folder / "model.yaml").write_text(f"handler: {{runtime: {runtime}}}")
    (folder / "bundle").mkdir()
    bundles.write_nvae(folder / "bundle", runtime=of_bundle)
    return folder


@pytest.mark.parametrize(
    ("runtimes", "visible", "expected"),
    [
        ([("torch", "auto")], None, 2),
        ([("auto", "torch")], None, 2),
        ([("torch", "auto"), ("onnxruntime", "torch")], None, 0),
        ([("auto", "auto")], None, 0),
        ([("torch", "auto")], "1", 1),
        ([("torch", "auto")], "", 0),
    ],
)
def test_workers_follow_the_gpus_of_models_that_compute_there(
    runtimes: list[tuple[str, str]],
    visible: str | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(workers, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    archives = [unpacked_archive(tmp_path / f"m{i}", *names) for i, names in enumerate(runtimes)]
    assert workers.gpus_for(archives) == expected


@pytest.mark.parametrize(("given", "expected"), [(None, (2, 3)), (4, (4, 1))])
def test_a_gpu_has_one_worker_unless_told_otherwise(
    given: int | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable", lambda: 6)
    monkeypatch.delenv("MLVGM_THREADS", raising=False)
    assert chosen(given, 0, [SMALL], gpus=2) == expected
