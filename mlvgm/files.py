"""Find image files in folders, read files with a size limit, and write them whole or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_BYTES = 256 * 2**20
"""Largest image file. The largest image that is decoded, 16 million pixels of four 16-bit channels, has 128 MiB."""

_SCRATCH, _LOCK = ".mlvgm-scratch-", ".lock"

Complain = Callable[[Path, str], None]
"""Called with a file or folder, and its error."""


def image_files(folder: Path, apart_from: Path | None = None, complain: Complain | None = None) -> Iterator[Path]:
    """Files below ``folder`` with the name of an image file, sorted. Links to folders are not followed.

    Args:
        apart_from: a folder below ``folder`` to leave out.
        complain: called for each folder that cannot be read; without it, an OSError is raised.
    """

    def fail(error: OSError) -> None:
        if complain is None:
            raise error
        complain(Path(error.filename), str(error.strerror))

    left_out = os.path.realpath(apart_from) if apart_from else None
    for path, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(
            name for name in folders if left_out is None or os.path.realpath(os.path.join(path, name)) != left_out
        )
        yield from (Path(path, name) for name in sorted(files) if name.lower().endswith(SUFFIXES))


def named_files(
    given: Sequence[Path], apart_from: Path | None = None, complain: Complain | None = None
) -> list[tuple[Path, Path]]:
    """Each file of ``given`` and each image file in its folders, with its path below the folder; see `image_files`."""
    names = []
    for path in given:
        if os.path.isdir(path):
            names += [(file, file.relative_to(path)) for file in image_files(path, apart_from, complain)]
        else:
            names.append((path, Path(path.name)))
    return names


def read_file(path: Path) -> bytes:
    """The content of a regular file of at most `MAX_BYTES`.

    Raises:
        OSError: with the reason as its ``strerror``.
    """
    with open_file(path) as file:
        data = file.read(MAX_BYTES + 1) if os.fstat(file.fileno()).st_size <= MAX_BYTES else None
    if data is None or len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_BYTES >> 20} MiB", str(path))
    return data


def open_file(path: Path) -> BinaryIO:
    """A regular file, to read; others could block.

    Raises:
        OSError: with the reason as its ``strerror``.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    # Without blocking, in case it has become a pipe by now.
    return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Have the file ``path``, which is made where it is missing, for this process alone; gives its descriptor.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who had it until now may have removed or renamed it: then this is no longer the file of that name.
        if not (path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())):
            raise BlockingIOError(errno.EWOULDBLOCK, "another process has just had it", str(path))
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A draft to write, which takes the place of ``file`` at the end, or is removed where something fails.

    So whoever reads ``file`` finds the old content or the new one, whole. A process that is killed leaves its draft to
    the next one that writes ``file``.

    Raises:
        BlockingIOError: another process is writing ``file``.
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Of any name that a file can have, which may be too long for more letters.
    draft = file.with_name(f".{hashlib.sha256(os.fsencode(file.name)).hexdigest()[:16]}.part")
    with locked(draft) as descriptor:
        try:
            yield draft
            os.fsync(descriptor)
            draft.replace(file)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder below ``parent`` to work in, which is removed at the end; so are those that killed processes have left.

    Raises:
        OSError: it cannot be made.
    """
    for left in parent.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError), locked(left / _LOCK):  # it is no process's any more
            shutil.rmtree(left)
    with contextlib.ExitStack() as stack:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
            # Otherwise another process has just taken it for one that is left.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                stack.enter_context(locked(folder / _LOCK))
                break
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def shown(path: Path | str) -> str:
    """``path`` for a terminal: unprintable characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
