"""The folder ``engines`` of a bundle: engines built in advance, each with a JSON file that says what it is.

The JSON file has the digest of the graph, the library and its version, the GPUs, and the digest of the engine. An
engine of another graph or version, for another GPU, or damaged is never loaded.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handlers.manifest import FileDigest
from handlers.runtimes import EngineError, memory

FOLDER = "engines"

ANY = "any"
"""Target of an engine that runs on every GPU and on the CPU."""


def digest(file: Path) -> str:
    """SHA-256 of a graph and its external weights."""
    files = [path for path in (file, memory.external(file)) if path.is_file()]
    return hashlib.sha256(b"".join(bytes.fromhex(FileDigest.of(path).sha256) for path in files)).hexdigest()


def find(file: Path, name: str, version: str, target: str = ANY, suffix: str = ".engine") -> Path:
    """Path of the engine of the graph ``file`` for a compute capability such as "9.0".

    Raises:
        EngineError: there is no undamaged engine of this graph, library, version and GPU.
    """
    graph = digest(file)
    for path in sorted((file.parent / FOLDER).glob(f"{file.stem}-*.json")):
        try:
            found, engine = read_info(path), path.with_suffix(suffix)
            wanted = {"graph": graph, "library": name, "version": version}
            if target in found["targets"] and is_intact(engine, wanted):
                return engine
        except (OSError, ValueError, KeyError, TypeError):
            continue  # incomplete, or written by something else
    where = "" if target == ANY else f" for a GPU of compute capability {target}"
    raise EngineError(f"{file}: has no engine by {name} {version}{where}; mlvgm export --engines {name} builds one")


def read_info(engine: Path) -> dict[str, Any]:
    """The content of an engine's JSON file.

    Raises:
        OSError, ValueError: the file is missing, or is not a JSON object.
    """
    content = json.loads(engine.with_suffix(".json").read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{engine}: its JSON file is not an object")
    return content


def write_info(engine: Path, info: Mapping[str, Any]) -> None:
    """Write the JSON file of ``engine``: ``info`` and the engine's SHA-256."""
    content = {**info, "engine": FileDigest.of(engine).sha256}
    engine.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")


def is_intact(engine: Path, info: Mapping[str, Any]) -> bool:
    """Whether ``engine`` exists, is undamaged, and its JSON file has all entries of ``info``."""
    try:
        found, wanted = read_info(engine), json.loads(json.dumps(info))
        same = all(found[key] == value for key, value in wanted.items())
        return same and FileDigest.of(engine).sha256 == found["engine"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
