"""Memory of large weights: what a library reads while it makes a copy of its own is given back at once."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

LARGE_BYTES = 64_000_000
"""Graphs with more bytes of weights than this are loaded with care for memory, others for speed."""

_MADV_DONTNEED, _PROT_READ, _M_MMAP_THRESHOLD = 4, 1, -3  # of Linux, and of its C library
_EVERY_S = 0.02  # a core reads 20 to 80 MB of weights in this time
_MAPPED_BYTES = 1_000_000


def of_weights(file: Path) -> int:
    """Bytes of the graph ``file`` and of its external data."""
    return sum(path.stat().st_size for path in (file, external(file)) if path.is_file())


def external(file: Path) -> Path:
    """Where the external data of the graph ``file`` lies, if it has any."""
    return file.with_name(f"{file.name}.data")


@contextlib.contextmanager
def sparing(give_back: Callable[[], None], every_s: float = _EVERY_S) -> Iterator[None]:
    """Call ``give_back`` again and again, in a thread, while a library reads weights, and once more at the end."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(every_s):
            give_back()

    thread = threading.Thread(target=repeat, name="give memory back", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        give_back()


def return_freed() -> None:
    """From now on, let the C library return blocks of a megabyte or more to the system when they are freed.

    By default glibc keeps freed blocks up to 32 MB for later ones, which hardly any weight of a graph that is being
    optimised fits: the process grows to twice the weights, and stays so.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def forget(file: Path) -> None:
    """Give back the memory in which this process sees ``file``: pages that it needs again are mapped anew.

    What a process may write is left alone. Only on Linux; elsewhere nothing happens.
    """
    _each_mapping(file, "madvise", _MADV_DONTNEED, lambda rights: "w" not in rights)


def seal(file: Path) -> None:
    """Let this process only read where it sees ``file``, so that `forget` gives it back. To write ends the process."""
    _each_mapping(file, "mprotect", _PROT_READ, lambda rights: rights.startswith("rw-p"))


def _each_mapping(file: Path, call: str, argument: int, wanted: Callable[[str], bool]) -> None:
    """The ``call`` of the system with ``argument``, for each mapping of ``file`` with ``wanted`` rights ("r--p")."""
    try:
        function, lines = getattr(ctypes.CDLL(None), call), Path("/proc/self/maps").read_text(errors="replace")
    except (OSError, AttributeError, TypeError):
        return
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    path = os.path.realpath(file)
    for line in lines.splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5] == path and wanted(fields[1]):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            function(start, end - start, argument)
