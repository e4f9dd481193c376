"""The default number of workers for a machine, and their threads."""

import os
from collections.abc import Iterable
from pathlib import Path

from deploy import model_archive
from handlers import cores
from handlers.torchserve import THREADS_VARIABLE

CORES_EACH = 8
"""Cores per worker of a large model."""
SMALL = 64_000_000
"""Largest archive, in bytes, of a small model: each core gets a worker, and one more worker reads requests while the
others compute. For a large model, whose batches take seconds, that is not worth the memory (docs/metrics.md)."""
MOST_SHARES = 8
"""Largest number of workers of a small model, without the additional one; on more cores each has several threads."""

_DEVICES = Path("/dev")
_MEMORY_EACH = 3.0  # memory of a worker as a multiple of its archive: the model, its activations, and OpenVINO's copy
_MEMORY_MORE = 800e6  # bytes for any model
# Bytes: a WebP of 16 million pixels takes 332 MB while it is decoded, and each worker decodes one at a time.
_MEMORY_IMAGE = 400e6
_JAVA = 1.5e9  # bytes: its heap, as deploy/config.properties has it, and the bodies that it holds outside of that


def chosen(workers: int | None, threads: int, sizes: Iterable[int], gpus: int = 0) -> tuple[int, int]:
    """Workers per model, and threads per worker: the given numbers, or defaults for archives of these ``sizes``.

    0 threads leaves the number to the archive, or to $MLVGM_THREADS. Models that compute on ``gpus`` get a worker for
    each of these, to which TorchServe assigns them in turn.
    """
    workers = workers or gpus
    if workers:
        suited = max(1, cores.usable() // workers) if workers > 1 else 0
    else:
        workers, suited = fitting(list(sizes))
    return workers, threads or (0 if THREADS_VARIABLE in os.environ else suited)


def fitting(sizes: list[int]) -> tuple[int, int]:
    """Default workers per model and threads per worker for archives of these ``sizes`` in bytes, served together."""
    small = max(sizes, default=0) <= SMALL
    mine = max(1, cores.usable() // max(len(sizes), 1))
    shares = min(mine, MOST_SHARES) if small else max(1, mine // CORES_EACH)
    wanted = shares + 1 if small else shares
    needed = sum(_MEMORY_EACH * size + _MEMORY_MORE + _MEMORY_IMAGE for size in sizes)
    workers = max(1, min(wanted, int((available_memory() - _JAVA) / max(needed, 1))))
    shares = min(shares, workers)
    return workers, mine // shares if shares > 1 else 0


def available_memory() -> float:
    """Free memory in bytes, of the machine and within the process's control groups."""
    import psutil

    available = float(psutil.virtual_memory().available)
    for group in cores.groups("memory"):
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            try:
                available = min(available, float((group / most).read_text()) - float((group / used).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return max(available, 0.0)


def gpus_for(archives: Iterable[Path]) -> int:
    """How many GPUs are here, if all the models compute on GPUs; otherwise 0."""
    if any(model_archive.read(archive).on_cpu for archive in archives):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(
        list(_DEVICES.glob("nvidia[0-9]*")) if visible is None else [name for name in visible.split(",") if name]
    )


def sizes_of(archives: Iterable[Path]) -> list[int]:
    """Sizes of archives in bytes; 0 for a missing one, which the server reports."""
    return [archive.stat().st_size if archive.exists() else 0 for archive in archives]
