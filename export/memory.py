"""Memory that is free goes back to the system: stages hold gigabytes each, and there is a next one."""

import ctypes
import gc


def release() -> None:
    """Collect what only cycles keep alive, and have glibc return the pages that it keeps for itself."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library, which keeps its own counsel
        return
