"""Cores within control groups, in both of Linux's layouts."""

import os
from pathlib import Path

import pytest

from handlers import cores


def grant(monkeypatch: pytest.MonkeyPatch, root: Path, groups: str, files: dict[str, str]) -> None:
    """Put this process in ``groups``, as /proc/self/cgroup says it, whose files below /sys/fs/cgroup are ``files``."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(cores, "_CGROUPS", root)
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, *a, **b: groups if str(path) == "/proc/self/cgroup" else read(path, *a, **b)
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "250000 100000\n"}, 2),
        ("0::/pod/box\n", {"pod/box/cpu.max": "50000 100000\n", "pod/cpu.max": "800000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        (
            "5:memory:/box\n4:cpu,cpuacct:/box\n",
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        (
            "4:cpu,cpuacct:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("", {}, None),
    ],
)
def test_what_control_groups_grant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, groups: str, files: dict[str, str], expected: int | None
) -> None:
    grant(monkeypatch, tmp_path, groups, files)
    assert cores.granted() == expected
    assert cores.usable() == (expected or 64)


def test_a_grant_of_more_than_there_is_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    grant(monkeypatch, tmp_path, "0::/\n", {"cpu.max": "9900000 100000\n"})
    assert cores.usable() == 64


def test_here() -> None:
    assert 1 <= cores.usable() <= len(os.sched_getaffinity(0))
