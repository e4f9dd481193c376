"""Files that are replaced while others read them."""

import os
from pathlib import Path

DRAFT_SUFFIX = ".tmp"
"""Ends the name of a file that is being written, and that a killed process leaves behind."""


def replace(path: Path, text: str, mode: int = 0o666) -> None:
    """Write ``text`` to ``path``: a reader finds all of it, or what was there before.

    Args:
        mode: rights of the file, without those that the umask takes.
    """
    draft = path.with_name(path.name + DRAFT_SUFFIX)
    draft.touch(mode)
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
