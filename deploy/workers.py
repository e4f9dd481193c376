"""How many workers suit a machine, where nobody says, and how they share its cores."""

import os
from collections.abc import Iterable
from pathlib import Path

from handlers import cores
from handlers.torchserve import THREADS_VARIABLE

CORES_EACH = 8
"""Each so many get a worker of a large model."""
SMALL = 64_000_000
"""Bytes of an archive that can be loaded often: each core gets a worker, and one more reads requests while the others
compute. Where a batch takes seconds, that is not worth a further copy of the model (docs/metrics.md)."""
MOST_SHARES = 8
"""Of the cores for a small model: where there are more, several go to each worker."""

_MEMORY_EACH = 3.0  # of its archive: the model, what is computed with it, and what OpenVINO makes of it
_MEMORY_MORE = 800e6  # bytes, whatever the model
_MEMORY_IMAGE = (
    400e6  # bytes: a WebP of 16 million pixels takes 332 MB while it is decoded, and each worker one at a time
)
_JAVA = 1.5e9  # bytes: its heap, as deploy/config.properties has it, and the bodies that it holds outside of that


def chosen(workers: int | None, threads: int, sizes: Iterable[int]) -> tuple[int, int]:
    """Workers of each model, and threads of each worker: those given, or those that suit models of these ``sizes``.

    Threads are 0 where that is to be left to the archive, or to $MLVGM_THREADS.
    """
    if workers:
        suited = max(1, cores.usable() // workers) if workers > 1 else 0
    else:
        workers, suited = fitting(list(sizes))
    return workers, threads or (0 if THREADS_VARIABLE in os.environ else suited)


def fitting(sizes: list[int]) -> tuple[int, int]:
    """The same for archives of these ``sizes`` in bytes, served together, where nothing is given."""
    small = max(sizes, default=0) <= SMALL
    mine = max(1, cores.usable() // max(len(sizes), 1))
    shares = min(mine, MOST_SHARES) if small else max(1, mine // CORES_EACH)
    wanted = shares + 1 if small else shares
    needed = sum(_MEMORY_EACH * size + _MEMORY_MORE + _MEMORY_IMAGE for size in sizes)
    workers = max(1, min(wanted, int((available_memory() - _JAVA) / max(needed, 1))))
    shares = min(shares, workers)
    return workers, mine // shares if shares > 1 else 0


def available_memory() -> float:
    """Bytes that can still be had, on the machine and within this process's control groups."""
    import psutil  # type: ignore[import-untyped]

    available = float(psutil.virtual_memory().available)
    for group in cores.groups("memory"):
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            try:
                available = min(available, float((group / most).read_text()) - float((group / used).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return max(available, 0.0)


def sizes_of(archives: Iterable[Path]) -> list[int]:
    """In bytes; 0 of what is missing, which the server will say."""
    return [archive.stat().st_size if archive.exists() else 0 for archive in archives]
