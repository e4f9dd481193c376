"""A folder that one process works in at a time."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from deploy.errors import CliError
from mlvgm.files import locked, shown

_LOCK = ".mlvgm-lock"


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Have ``folder``, which is made where it is missing, for this process alone.

    Raises:
        CliError: another process has it, or it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / _LOCK))
        except BlockingIOError:
            raise CliError(
                f"another job is writing to {shown(folder)}: wait for it, or choose another folder"
            ) from None
        except OSError as error:
            raise CliError(f"{shown(folder)}: {error.strerror}") from None
        yield


def was_claimed(folder: Path) -> bool:
    """Whether ``folder`` is there, and is a job's or empty."""
    return folder.is_dir() and ((folder / _LOCK).is_file() or not any(folder.iterdir()))


def remove(folder: Path) -> None:
    """Remove a folder that this process has claimed.

    The lock goes last: if it is killed meanwhile, what is left `was_claimed`.
    """
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
    shutil.rmtree(folder)
