from pathlib import Path

import pytest

from cli import workers
from handlers import cores


@pytest.mark.parametrize(
    ("usable", "models", "gigabytes", "expected"),
    [(2, 1, 64, 1), (15, 1, 64, 1), (16, 1, 64, 2), (64, 1, 64, 8), (64, 2, 64, 4), (64, 1, 3, 2), (64, 1, 0.1, 1)],
)
def test_workers_by_cores_and_memory(
    usable: int, models: int, gigabytes: float, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = []
    for i in range(models):
        archives.append(tmp_path / f"{i}.mar")
        with archives[-1].open("wb") as file:
            file.truncate(300_000_000)  # 1.3 GB for a worker
    monkeypatch.setattr(cores, "usable", lambda: usable)
    monkeypatch.setattr(workers, "available_memory", lambda: gigabytes * 1e9)
    assert workers.fitting(archives) == expected


def test_an_archive_that_is_missing_is_for_the_server_to_say(tmp_path: Path) -> None:
    assert workers.fitting([tmp_path / "absent.mar"]) >= 1
