"""Archives unpacked for TorchServe, which takes a folder in the place of an archive, and kept for later starts.

TorchServe itself would unpack every archive at every start, which takes a core ten seconds for each gigabyte; and files
that stay the same have their digests computed once (`handlers.manifest`).
"""

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from deploy.errors import CliError
from deploy.model_archive import DAMAGED
from deploy.signals import pause
from handlers.runtimes import cache

_RECORD = ".unpacked.json"
_DRAFT = ".draft"


def prepare(store: Path, archives: Sequence[Path]) -> None:
    """Let the folder ``store`` have each of ``archives`` under its name: unpacked if it is a .mar, else as a link.

    What is there already is used if it was unpacked from the same file, and if neither that nor what was unpacked has
    changed since. Everything else in the folder is removed, also what a killed process has left.

    Raises:
        CliError: an archive is damaged, or does not fit on the disk.
        Stopped: a signal has arrived (`deploy.signals`).
    """
    if store.exists() and not cache.is_private(store):
        shutil.rmtree(store)
    store.mkdir(mode=0o700, exist_ok=True)
    kept = {archive.name for archive in archives if _is_unaltered(store / archive.name, archive)}
    for path in store.iterdir():
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif path.name not in kept:
            shutil.rmtree(path)
    for archive in archives:
        if archive.is_dir() or archive.name.endswith(".tar.gz"):
            (store / archive.name).symlink_to(archive.resolve())
        elif archive.name not in kept:
            _unpack(archive, store / _DRAFT)
            os.replace(store / _DRAFT, store / archive.name)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a .mar, and record from what, and what has become of it."""
    record = {"archive": cache.state(archive), "files": dict[str, list[int]]()}
    try:
        with zipfile.ZipFile(archive) as zipped:
            if sum(member.file_size for member in zipped.infolist()) > shutil.disk_usage(folder.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for member in zipped.infolist():
                zipped.extract(member, folder)
                pause(0)
    except DAMAGED as error:
        raise CliError(f"{archive}: damaged ({error}): build it again with mlvgm archive BUNDLE") from None
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CliError(f"{archive}: cannot be unpacked into {folder.parent}: {error.strerror}") from None
    files = (path for path in folder.rglob("*") if path.is_file())
    record["files"] = {path.relative_to(folder).as_posix(): cache.state(path) for path in files}
    (folder / _RECORD).write_text(json.dumps(record))


def _is_unaltered(folder: Path, archive: Path) -> bool:
    """Whether ``folder`` holds what was unpacked from ``archive``. Files that Python has added since do not matter."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        files = {name: cache.state(folder / name) for name in record["files"]}
        return bool(record == {"archive": cache.state(archive), "files": files})
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
