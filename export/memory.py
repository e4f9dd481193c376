"""Return freed memory to the operating system between stages, each of which may hold gigabytes."""

import ctypes
import gc


def release() -> None:
    """Collect reference cycles, and let glibc return its free pages to the system."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return
