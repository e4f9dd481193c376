"""Find image files in folders, and read them with a size limit."""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_BYTES = 256 * 2**20
"""Largest image file. The largest image that is decoded, 16 million pixels of four 16-bit channels, has 128 MiB."""

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
        OSError: with the reason as its ``strerror``. Only regular files are opened: others could block.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    # Without blocking, in case it has become a pipe by now.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        data = file.read(MAX_BYTES + 1) if os.fstat(file.fileno()).st_size <= MAX_BYTES else None
    if data is None or len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_BYTES >> 20} MiB", str(path))
    return data


def shown(path: Path | str) -> str:
    """``path`` for a terminal: unprintable characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
