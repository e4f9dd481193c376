"""Engines that were built beforehand: they lie in the folder ``engines`` of a bundle, each with a JSON info.

A info says what its engine is: of which graph, by which version of which library, for which GPUs. An engine that is of
another graph or version, or for another GPU, is never loaded.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handlers.runtimes import EngineError

FOLDER = "engines"

ANY = "any"
"""Stands for every GPU, and the CPU."""


def digest(file: Path) -> str:
    """SHA-256 of a graph, its external weights included."""
    found = hashlib.sha256()
    for path in (file, file.with_name(f"{file.name}.data")):
        if path.is_file():
            found.update(_sha256(path).digest())
    return found.hexdigest()


def find(file: Path, name: str, version: str, target: str = ANY, suffix: str = ".engine") -> Path:
    """The engine of the graph ``file`` for a GPU ("9.0"), among those beside it.

    Raises:
        EngineError: there is none that is of this very graph, library and GPU, and undamaged.
    """
    graph = digest(file)
    for path in sorted((file.parent / FOLDER).glob(f"{file.stem}-*.json")):
        try:
            found, engine = read_info(path), path.with_suffix(suffix)
            wanted = {"graph": graph, "library": name, "version": version}
            if target in found["targets"] and is_intact(engine, wanted):
                return engine
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half written or not ours: as good as none
    where = "" if target == ANY else f" for a GPU of compute capability {target}"
    raise EngineError(f"{file}: no engine of it by {name} {version}{where}; mlvgm export --engines {name} builds one")


def read_info(engine: Path) -> dict[str, Any]:
    """What is written beside an engine.

    Raises:
        OSError, ValueError: there is nothing, or no JSON object.
    """
    content = json.loads(engine.with_suffix(".json").read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{engine}: its info is no JSON object")
    return content


def write_info(engine: Path, info: Mapping[str, Any]) -> None:
    """Write beside ``engine`` what it is, with its SHA-256."""
    content = {**info, "engine": _sha256(engine).hexdigest()}
    engine.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")


def is_intact(engine: Path, info: Mapping[str, Any]) -> bool:
    """Whether ``engine`` is there, undamaged, and what is written beside it has all of ``info``."""
    try:
        found, wanted = read_info(engine), json.loads(json.dumps(info))
        same = all(found[key] == value for key, value in wanted.items())
        return same and _sha256(engine).hexdigest() == found["engine"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> "hashlib._Hash":
    with path.open("rb") as stream:
        found = hashlib.sha256()
        while part := stream.read(1 << 20):
            found.update(part)
        return found
