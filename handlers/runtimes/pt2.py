"""Archives of `torch.export`, read without running anything that lies in them.

What `torch.export.load` of PyTorch 2.13 does with an archive: weights are raw bytes, unless their entry says
``use_pickle``; script and opaque objects are pickles; so are the sample inputs, which are unpickled without
restrictions where ``weights_only`` fails; shapes are Python expressions, evaluated by SymPy; guards are Python code; a
folder of AOTInductor holds native libraries; and archives of older versions are pickles throughout. We write none of
these but plain shapes, and refuse an archive that has any. Guards are left alone: the pipeline checks shapes itself.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive._package import PT2ArchiveReader

from handlers.runtimes import EngineError

_MODEL, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|data/(weights/weight|constants/tensor)_\d+|"
    + "|".join(map(re.escape, (_MODEL, _SAMPLES, *_CONFIGS)))
)
# Of the batch, such as ``2*Symbol('s34', positive=True, integer=True)``.
_SHAPE = re.compile(r"(?:Symbol\('s\d+'(?:, (?:positive|integer|nonnegative)=True)*\)|[\d\s()+*-]|FloorDiv|Mod|,)*")
# Operators that compute, and arithmetic with shapes.
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|torch\.sym_\w+|"
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|getitem)"
)


def read(path: Path) -> torch.export.ExportedProgram:
    """The program in an archive.

    Raises:
        EngineError: it is damaged, or holds something else than operators, shapes and raw weights.
    """
    try:
        _check(path)
        return torch.export.load(path)
    except EngineError:
        raise
    except Exception as error:  # PyTorch raises anything: assertions, key errors, its own
        raise EngineError(f"{path}: PyTorch cannot load it: {error}") from error


def _check(path: Path) -> None:
    reader = PT2ArchiveReader(str(path))
    for name in reader.get_file_names():
        if not _RECORDS.fullmatch(name):
            raise EngineError(f"{path}: {name} has no place in an archive of operators and raw weights")
    if reader.read_bytes(_SAMPLES):
        raise EngineError(f"{path}: it has sample inputs, which are pickled: they are never loaded")
    for config in _CONFIGS:
        for name, entry in json.loads(reader.read_string(config))["config"].items():
            if entry["use_pickle"] is not False:
                raise EngineError(f"{path}: {name} is pickled: pickles are never loaded")
    model = json.loads(reader.read_string(_MODEL))
    for node in model["graph_module"]["graph"]["nodes"]:
        if not _OPERATOR.fullmatch(node["target"]):
            raise EngineError(f"{path}: it calls {node['target'][:80]!r}, which is no operator on tensors or shapes")
    for shape in _shapes(model):
        if not _SHAPE.fullmatch(shape):
            raise EngineError(f"{path}: {shape[:80]!r} is no plain shape")


def _shapes(value: Any, key: str = "") -> Iterator[str]:
    """Every expression that would be evaluated."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _shapes(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _shapes(part)
    elif key == "expr_str":
        yield str(value)
