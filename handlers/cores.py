"""The number of CPU cores that this process may use, with the limits of its container, and what they are."""

import functools
import os
import platform
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OF_THE_CPU = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "cpu part", "features")


def usable() -> int:
    """Cores by the CPU affinity of the process or by its control groups' limit, whichever is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, granted() or allowed)


def granted() -> int | None:
    """The CPU limit of the control groups (``docker --cpus``, a limit of Kubernetes) in whole cores, at least 1.

    None without a limit. With more threads, some would be throttled, and the others would wait for them.
    """
    shares = [share for share in map(_share, groups("cpu")) if share is not None]
    return max(1, int(min(shares))) if shares else None


def groups(resource: str) -> list[Path]:
    """Folders of the process's control group for "cpu" or "memory", and of the groups that contain it.

    For versions 1 and 2 of control groups; version 2 has one tree for all resources.
    """
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = _CGROUPS
        elif resource in controllers.split(","):
            top = _CGROUPS / controllers
        else:
            continue
        group = top / path.lstrip("/")
        found += [group, *(parent for parent in group.parents if parent.is_relative_to(top))]
    return found


@functools.cache
def kind() -> str:
    """Model and instruction sets of the CPU: what is compiled or measured for one kind does not hold for another."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip().lower() in _OF_THE_CPU]
    return "\n".join([platform.machine(), *lines])


def _share(folder: Path) -> float | None:
    """The CPU limit of one control group, in cores; version 2 has it in one file, version 1 in two."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            return int(quota) / int(period) if int(quota) > 0 else None
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None
