"""A limit on memory while strangers' images are read: what wants more fails alone, instead of the whole worker."""

import contextlib
import functools
import os
from collections.abc import Iterator


@contextlib.contextmanager
def memory(more: int) -> Iterator[None]:
    """Let this process allocate ``more`` bytes beyond what it has: allocations that want more raise MemoryError.

    Linux alone counts so (RLIMIT_DATA: what is private and writable). Elsewhere nothing is limited.
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
    """A file that stays open: to open one takes longer than all the rest."""
    return os.open(f"/proc/{process}/statm", os.O_RDONLY | os.O_CLOEXEC)
