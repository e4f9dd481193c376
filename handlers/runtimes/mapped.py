"""Files that a library has mapped into memory."""

import ctypes
import os
from pathlib import Path

_MADV_DONTNEED = 4  # of Linux


def forget(file: Path) -> None:
    """Give back the memory in which this process sees ``file``: pages that it needs again are mapped anew.

    What a process may write is left alone. Only on Linux; elsewhere nothing happens.
    """
    try:
        advise, lines = ctypes.CDLL(None).madvise, Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except (OSError, AttributeError):
        return
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    path = os.path.realpath(file)
    for line in lines:
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5] == path and "w" not in fields[1]:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            advise(start, end - start, _MADV_DONTNEED)
