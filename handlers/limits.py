"""A memory limit while images of clients are decoded: an image that exceeds it is refused, and the worker goes on."""

import contextlib
import functools
import os
from collections.abc import Iterator


@contextlib.contextmanager
def memory(more: int) -> Iterator[None]:
    """Limit this process to its current memory and ``more`` bytes; further allocations raise MemoryError.

    Only on Linux (RLIMIT_DATA, which counts private writable memory). Elsewhere there is no limit.
    """
    try:
        import resource

        held = int(os.pread(_statm(os.getpid()), 200, 0).split()[5]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = held + more if before == resource.RLIM_INFINITY else min(before, held + more)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


@functools.cache
def _statm(process: int) -> int:
    """The open file; to open it every time would take longer than reading it."""
    return os.open(f"/proc/{process}/statm", os.O_RDONLY | os.O_CLOEXEC)
