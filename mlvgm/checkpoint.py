"""Reading checkpoint files: no pickled code is ever run, and every fault is one sentence that names file and key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handlers.errors import MlvgmError


class CheckpointError(MlvgmError, ValueError):
    """A checkpoint cannot be used: not a checkpoint, unsafe, of another family, or with wrong tensors."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dict that ``torch.save`` wrote to ``path``, on the CPU, read with ``weights_only=True``.

    A ``.safetensors`` file gives the same layout: its tensors under ``state_dict``, its metadata (JSON) beside them.

    Raises:
        CheckpointError: the file is missing, truncated, no checkpoint, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"{path}: not a checkpoint of plain tensors: it needs pickled code, which is never run, "
                "or is no PyTorch file at all"
            ) from None
        raise CheckpointError(f"{path}: truncated or not a PyTorch checkpoint") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a checkpoint is a dict; this file holds a {type(content).__name__}")
    return content


def entry(checkpoint: Mapping[str, Any], key: str, path: str | Path) -> Any:
    """``checkpoint[key]``, or a clear error that lists what the file holds instead."""
    if key not in checkpoint:
        held = ", ".join(repr(k) for k in list(checkpoint)[:4]) or "nothing"
        raise CheckpointError(f"{path}: has no entry {key!r} (it holds {held}): is it of another family?")
    return checkpoint[key]


def load_tensors(module: nn.Module, tensors: Mapping[str, Any], path: str | Path) -> None:
    """Fill every parameter and buffer of ``module`` from ``tensors``: none missing, none left over.

    Raises:
        CheckpointError: naming the file and the first missing, unexpected, misshapen or non-finite key.
    """
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path}: the weights are a {type(tensors).__name__}, not a dict of tensors")
    own = module.state_dict()
    for key, value in own.items():
        if key not in tensors:
            raise CheckpointError(f"{path}: tensor {key!r} is missing")
        given = tensors[key]
        if not isinstance(given, Tensor):
            raise CheckpointError(f"{path}: {key!r} is a {type(given).__name__}, not a tensor")
        if given.layout is not torch.strided or given.is_meta:
            raise CheckpointError(f"{path}: {key!r} is no ordinary tensor with values")
        if given.shape != value.shape:
            raise CheckpointError(f"{path}: {key!r} has shape {tuple(given.shape)}, expected {tuple(value.shape)}")
        if given.is_floating_point() != value.is_floating_point():
            raise CheckpointError(f"{path}: {key!r} has type {given.dtype}, expected {value.dtype}")
        if given.is_floating_point() and not torch.isfinite(given).all():
            raise CheckpointError(f"{path}: {key!r} holds NaN or infinite values")
    for key in tensors:
        if key not in own:
            raise CheckpointError(f"{path}: unexpected tensor {key!r}")
    # Cloned: the tensors may be a memory map of a file that somebody overwrites later.
    cast = {key: tensors[key].to(value.dtype, copy=True) for key, value in own.items()}
    module.load_state_dict(cast, strict=True, assign=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return {**metadata, "state_dict": tensors}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None


def _is_zip(path: Path) -> bool:
    # Only the zip format of torch >= 1.6 can be memory-mapped.
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
