"""How many workers suit a machine, where nobody says."""

from collections.abc import Sequence
from pathlib import Path

from handlers import cores

CORES_EACH = 8
"""Below that one worker with all cores answers sooner and takes less memory (docs/metrics.md)."""

_MEMORY_EACH = 3.0  # of its archive: the model, what is computed with it, and what OpenVINO makes of it
_MEMORY_MORE = 400e6  # bytes, whatever the model


def fitting(archives: Sequence[Path]) -> int:
    """Workers for each of ``archives``, served together: one for every `CORES_EACH` cores, as memory allows."""
    by_cores = cores.usable() // (CORES_EACH * len(archives))
    needed = sum(_MEMORY_EACH * archive.stat().st_size + _MEMORY_MORE for archive in archives if archive.is_file())
    return max(1, min(by_cores, int(available_memory() / max(needed, 1))))


def available_memory() -> float:
    """Bytes that can still be had."""
    import psutil  # type: ignore[import-untyped]

    return float(psutil.virtual_memory().available)
