"""Read archives of `torch.export` without executing any code in them.

How `torch.export.load` of PyTorch 2.13 can execute code: weights whose entry says ``use_pickle``, script objects,
opaque objects and sample inputs are unpickled (sample inputs without restrictions if ``weights_only`` fails); shapes
are Python expressions, evaluated by SymPy; guards are Python code; a folder of AOTInductor holds native libraries;
archives of older versions are pickles. An export writes weights as raw bytes and plain shapes only, so an archive with
anything else is refused. Guards are not evaluated: the pipeline checks shapes itself.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive._package import PT2ArchiveReader

from handlers.runtimes import EngineError, engine_errors

_MODEL, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|data/(weights/weight|constants/tensor)_\d+|"
    + "|".join(map(re.escape, (_MODEL, _SAMPLES, *_CONFIGS)))
)
# Such as ``2*Symbol('s34', positive=True, integer=True)``, where the symbol is the batch size.
_SHAPE = re.compile(r"(?:Symbol\('s\d+'(?:, (?:positive|integer|nonnegative)=True)*\)|[\d\s()+*-]|FloorDiv|Mod|,)*")
# Operators on tensors, and arithmetic with shapes.
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|torch\.sym_\w+|"
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|getitem)"
)


def read(path: Path) -> torch.export.ExportedProgram:
    """The program in an archive.

    Raises:
        EngineError: it is damaged, or has something else than operators, shapes and raw weights.
    """
    with engine_errors(f"{path}: PyTorch cannot load it"):
        _check(path)
        return torch.export.load(path)


def _check(path: Path) -> None:
    reader = PT2ArchiveReader(str(path))
    for name in reader.get_file_names():
        if not _RECORDS.fullmatch(name):
            raise EngineError(f"{path}: {name} does not belong in an archive of operators and raw weights")
    if reader.read_bytes(_SAMPLES):
        raise EngineError(f"{path}: it has sample inputs, which are pickled: pickles are never loaded")
    for config in _CONFIGS:
        for name, entry in json.loads(reader.read_string(config))["config"].items():
            if entry["use_pickle"] is not False:
                raise EngineError(f"{path}: {name} is pickled: pickles are never loaded")
    model = json.loads(reader.read_string(_MODEL))
    for node in model["graph_module"]["graph"]["nodes"]:
        if not _OPERATOR.fullmatch(node["target"]):
            raise EngineError(f"{path}: it calls {node['target'][:80]!r}, which is not an operator of PyTorch")
    for shape in _shapes(model):
        if not _SHAPE.fullmatch(shape):
            raise EngineError(f"{path}: {shape[:80]!r} is not a plain shape")


def _shapes(value: Any, key: str = "") -> Iterator[str]:
    """Every expression that loading would evaluate."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _shapes(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _shapes(part)
    elif key == "expr_str":
        yield str(value)
