"""How many cores this process may use: a container's share of them is not what the machine has."""

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable() -> int:
    """Cores that this process is allowed on, or whose time its control groups grant it, whichever are fewer."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, granted() or allowed)


def granted() -> int | None:
    """Whole cores of the time that control groups grant (``docker --cpus``, a limit of Kubernetes), 1 at least.

    None without a limit. A thread more than these would be stopped, with all the others waiting for it.
    """
    shares = [share for share in map(_share, groups("cpu")) if share is not None]
    return max(1, int(min(shares))) if shares else None


def groups(resource: str) -> list[Path]:
    """Folders of this process's control group for "cpu" or "memory", and of all groups around it.

    In both layouts of Linux: version 2 has one tree for all resources.
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


def _share(folder: Path) -> float | None:
    """Cores' worth of time that one control group has; version 2 has it in one file, version 1 in two."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            return int(quota) / int(period) if int(quota) > 0 else None
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None
