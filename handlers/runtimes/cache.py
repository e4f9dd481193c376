"""What a library has compiled or measured, kept for later starts in files that only this user can write.

What lies there is loaded like code. So the folder is this user's own or none, files appear complete or not at all, and
one that is damaged is as good as missing. Nothing else depends on them: where nothing can be kept, it is made anew.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIABLE = "MLVGM_CACHE"

LIMIT_BYTES = 1_000_000_000
"""Largest size of a folder: beyond it or `LIMIT_ENTRIES`, what has not been used for longest is removed."""

LIMIT_ENTRIES = 1000

_CHECKSUM = hashlib.sha256
_CHECKSUM_BYTES = 32


def own_folder(name: str) -> Path | None:
    """The folder ``name`` of this user's cache: ``$MLVGM_CACHE``, ``$XDG_CACHE_HOME/mlvgm`` or ``~/.cache/mlvgm``.

    None where it cannot be made, or belongs to or can be written by others.
    """
    try:
        chosen = os.environ.get(VARIABLE)
        top = Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlvgm")
        folder = top / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        private = is_private(folder) and os.access(folder, os.W_OK)
    except (OSError, RuntimeError, AttributeError):  # no home, one that cannot be written to, or a system without users
        return None
    return folder if private else None


def is_private(folder: Path) -> bool:
    """Whether ``folder`` is this user's own and others cannot write there."""
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def state(path: Path) -> list[int]:
    """Numbers that change when the file ``path`` does, or is replaced: the last is kept by the system alone."""
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def read(name: str, key: Mapping[str, Any]) -> bytes | None:
    """What `write` has kept in the folder ``name`` under ``key``; None if it is missing or damaged."""
    try:
        if (folder := own_folder(name)) is None:
            return None
        path = folder / _entry(key)
        if not path.is_file():  # a pipe would block
            return None
        kept = path.read_bytes()
        content = kept[_CHECKSUM_BYTES:]
        if _CHECKSUM(content).digest() != kept[:_CHECKSUM_BYTES]:
            return None
        os.utime(path)
    except OSError:
        return None
    return content


def write(name: str, key: Mapping[str, Any], content: bytes) -> None:
    """Keep ``content`` in the folder ``name`` under ``key``, which JSON can express, if that is possible.

    A reader finds the whole entry or none, even if several processes write the same one.
    """
    if len(content) > LIMIT_BYTES or (folder := own_folder(name)) is None:
        return
    draft = None
    try:
        _make_room(folder, len(content))
        number, draft = tempfile.mkstemp(prefix=".draft-", dir=folder)
        with open(number, "wb") as stream:
            stream.write(_CHECKSUM(content).digest() + content)
        os.replace(draft, folder / _entry(key))
    except OSError:  # such as a full disk
        if draft:
            with contextlib.suppress(OSError):
                os.unlink(draft)


def _entry(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _make_room(folder: Path, needed: int) -> None:
    """Remove what has not been used for longest, drafts of killed processes included, until ``needed`` bytes fit."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            status = path.stat()
            if path.is_file():
                found.append((status.st_mtime, status.st_size, path))
    total, count = needed + sum(size for _, size, _ in found), 1 + len(found)
    for _, size, path in sorted(found):
        if total <= LIMIT_BYTES and count <= LIMIT_ENTRIES:
            return
        path.unlink(missing_ok=True)
        total, count = total - size, count - 1
