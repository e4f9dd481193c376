"""Read checkpoint files without running pickled code; every error is one sentence that names the file and the key."""

import contextlib
import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handlers.errors import MlvgmError
from handlers.runtimes import memory

Tensors = Mapping[Any, Any]

CHECKPOINT, SAFETENSORS = "a PyTorch checkpoint", "a safetensors file"

_KINDS: tuple[tuple[str, str], ...] = (  # how a file begins, and what it is then
    (r"\Z", "empty: a download or a copy that was cut off"),
    (r".{4}\x00{4}\{", SAFETENSORS),  # before all others: its first bytes are a length, which may read as anything
    (r"version https://git-lfs", "a Git LFS pointer, not the file that it stands for: run git lfs pull"),
    (r"\s*<", "a web page (HTML), not the file: most likely a page to sign in or to confirm a download"),
    (r"PK\x03\x04|\x80[\x01-\x05]", CHECKPOINT),
    (r"\x89HDF", "an HDF5 file, as Keras writes it"),
    (r"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!", "compressed: unpack it first"),
    (r'\s*\{.*"(metadata|weight_map)"', "an index of shards (JSON), not weights: save all of them to one file"),
    (r"\s*[\[{]", "JSON text, most likely a server's error in the place of a download"),
)


_CHUNK = 1 << 24  # numbers that are looked at together
_GIVEN_BACK_EVERY_S = 0.1
_CURE = "save the weights alone: torch.save(model.state_dict(), FILE)"
_ALIGNED = 64  # bytes, as PyTorch's own tensors are and saves them: products may differ in the last digit otherwise

_mapped: ContextVar[set[Path] | None] = ContextVar("mapped", default=None)


class CheckpointError(MlvgmError, ValueError):
    """A checkpoint cannot be used: it is not a checkpoint, unsafe, of another family, or has wrong tensors."""


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Models that are read within it share their weights with the files, which must not change as long as they live.

    So the weights take no memory that the system could not give to others, and pages that were read are given back
    again and again. They cannot be written to. Weights of another type than the model's are copied, as all are
    outside of this, and so are those that a file does not align to 64 bytes.
    """
    files = set[Path]()
    token = _mapped.set(files)

    def give_back() -> None:
        for file in files.copy():
            memory.forget(file)

    try:
        with memory.sparing(give_back, _GIVEN_BACK_EVERY_S):
            yield
    finally:
        _mapped.reset(token)


def kind_of(path: Path) -> str:
    """The kind of file by its first bytes, as the end of "This file is ..."; "" if unknown.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(512).decode("latin-1")
    return next((kind for pattern, kind in _KINDS if re.match(pattern, start, re.DOTALL)), "")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dict that ``torch.save`` wrote to ``path``, on the CPU, read with ``weights_only=True``.

    For a safetensors file: its tensors under ``state_dict``, and the entries of its metadata, parsed if they are JSON.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint, or has anything but tensors and plain values.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        kind = kind_of(path)
    except (OSError, ValueError) as error:  # ValueError: no file system takes such a name
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from None
    if kind == SAFETENSORS or (path.suffix == ".safetensors" and kind in ("", CHECKPOINT)):
        content = _read_safetensors(path)
    elif kind == CHECKPOINT:
        content = _read_pickled(path)
    else:
        raise CheckpointError(f"{path}: is {kind or f'not {CHECKPOINT} and not {SAFETENSORS}'}")
    if (files := _mapped.get()) is not None:
        memory.seal(path)
        files.add(path)
    return content


def _read_pickled(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            is_zip = zipfile.is_zipfile(path)  # the format since PyTorch 1.6, which alone can be mapped
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # of any class: what is read was written by a stranger
        raise CheckpointError(f"{path}: {_reason(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a checkpoint is a dict; this file holds a {type(content).__name__}")
    return content


def entry(checkpoint: Mapping[str, Any], key: str, path: str | Path) -> Any:
    """``checkpoint[key]``, or an error that lists the entries of the file."""
    if key not in checkpoint:
        raise CheckpointError(f"{path}: has no entry {key!r} ({_held(checkpoint)}): is it of another family?")
    return checkpoint[key]


def read_mapping(checkpoint: Mapping[str, Any], key: str, path: str | Path) -> Mapping[str, Any]:
    """An entry of a checkpoint that has to be a dict: the options or the weights."""
    value = entry(checkpoint, key, path)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: {key!r} is a {type(value).__name__}, not a dict")
    return value


def read_option(opts: Mapping[str, Any], key: str, kind: type, path: str | Path, default: Any = None) -> Any:
    """A training option of a given type; required if there is no ``default``."""
    value = opts.get(key, default)
    if type(value) is not kind:
        raise CheckpointError(f"{path}: option {key!r} should be a {kind.__name__}, not {value!r:.80}")
    return value


def find_weights(checkpoint: Mapping[str, Any], known: str, path: str | Path) -> Tensors:
    """The weights of a model that has a tensor named ``known``, under the model's own names.

    They are the entry ``state_dict`` or another one, or the whole file. Prefixes of wrappers are removed from their
    names: ``module.`` (data parallel), ``model.`` (Lightning), ``_orig_mod.`` (torch.compile), or any other common
    prefix.

    Raises:
        CheckpointError: there are no such weights, or several.
    """
    entries = {k: v for k, v in {**checkpoint, "the file itself": checkpoint}.items() if isinstance(v, Mapping)}
    found = {k: own for k, v in entries.items() if (own := unwrapped(v, known)) is not None}
    if "state_dict" in found or len(found) == 1:
        return found.get("state_dict") or next(iter(found.values()))
    if found:
        names = " and ".join(map(repr, found))
        raise CheckpointError(f"{path}: has weights under {names}: keep those that you want under 'state_dict'")
    tensors = entries.get("state_dict", checkpoint)
    alike = next((k for k in tensors if isinstance(k, str) and k.endswith(f".{known}")), None)
    held = f"it has {alike!r}, beside tensors without that prefix" if alike else _held(tensors)
    raise CheckpointError(f"{path}: tensor {known!r} is missing ({held}): is it of another architecture?")


def unwrapped(tensors: Tensors, known: str) -> Tensors | None:
    """``tensors`` without prefixes of wrappers, so that one is named ``known``; None if that is impossible."""
    for wrapper in (None, "_orig_mod", "module"):
        named = {_without(name, wrapper): value for name, value in tensors.items()}
        if len(named) < len(tensors):
            continue
        if known in named:
            return named
        for name in named:
            prefix = name.removesuffix(known) if isinstance(name, str) and name.endswith(f".{known}") else ""
            if prefix and all(isinstance(n, str) and n.startswith(prefix) for n in named):
                return {n.removeprefix(prefix): value for n, value in named.items()}
    return None


def width(tensors: Tensors, key: str, axis: int, published: int, path: str | Path) -> int:
    """Size of an axis of a tensor if it is smaller than the ``published`` one, which is returned otherwise.

    So a wrong tensor does not fit the model, and `load_tensors` names it.

    Raises:
        CheckpointError: there is no such tensor.
    """
    if key not in tensors:
        raise CheckpointError(f"{path}: tensor {key!r} is missing")
    value = tensors[key]
    if isinstance(value, Tensor) and value.ndim > axis and 0 < value.shape[axis] < published:
        return value.shape[axis]
    return published


def weights_digest(module: nn.Module, key: str = "") -> str:
    """SHA-256 of ``key``, and of the names and values of all parameters and buffers of ``module``."""
    digest = hashlib.sha256(key.encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_tensors(module: nn.Module, tensors: Tensors, path: str | Path) -> None:
    """Set every parameter and buffer of ``module`` from ``tensors``, of which none may be missing or left over.

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
        if given.layout is not torch.strided or given.is_meta or given.is_quantized or given.is_nested:
            raise CheckpointError(f"{path}: {key!r} is no ordinary tensor with values")
        if given.shape != value.shape:
            raise CheckpointError(f"{path}: {key!r} has shape {tuple(given.shape)}, expected {tuple(value.shape)}")
        if given.is_floating_point() != value.is_floating_point():
            raise CheckpointError(f"{path}: {key!r} has type {given.dtype}, expected {value.dtype}")
    for key in tensors:
        if key not in own:
            raise CheckpointError(f"{path}: unexpected tensor {key!r}")
    # Copied, unless `mapped`: the tensors may be a memory map of a file that is overwritten later.
    cast = {key: _cast(tensors[key], key, value.dtype, path) for key, value in own.items()}
    module.load_state_dict(cast, strict=True, assign=True)


def _cast(tensor: Tensor, key: str, dtype: torch.dtype, path: str | Path) -> Tensor:
    shared = _mapped.get() is not None and tensor.is_contiguous() and tensor.data_ptr() % _ALIGNED == 0
    try:
        cast = tensor.to(dtype, copy=not shared)
    except RuntimeError as error:  # of types that PyTorch can hold but not convert
        raise CheckpointError(f"{path}: {key!r} has type {tensor.dtype}: {_first_line(error)}") from None
    if not all(torch.isfinite(part).all() for part in cast.reshape(-1).split(_CHUNK)):
        raise CheckpointError(f"{path}: {key!r} holds values that are NaN, infinite, or too large for {dtype}")
    return cast


def _without(name: Any, component: str | None) -> Any:
    """A tensor's name without its parts equal to ``component``."""
    if component is None or not isinstance(name, str):
        return name
    return ".".join(part for part in name.split(".") if part != component)


def _held(entries: Mapping[Any, Any]) -> str:
    return f"it holds {', '.join(f'{key!r:.80}' for key in list(entries)[:4]) or 'nothing'}"


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = {key: _parsed(value) for key, value in (file.metadata() or {}).items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return {**metadata, "state_dict": tensors}
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({_first_line(error)})") from None


def _parsed(text: str) -> Any:
    """``text`` parsed as JSON, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _reason(error: Exception) -> str:
    """Why PyTorch cannot load a file. PyTorch's own message recommends to load it without ``weights_only``."""
    text = str(error)
    if names := re.findall(r"GLOBAL (\S+)", text):
        return f"not a checkpoint of plain tensors: it holds {names[0]}, pickled code, which is never run; {_CURE}"
    if "TorchScript" in text:
        return "a TorchScript archive, which holds code beside the weights: save model.state_dict() instead"
    if "weights_only" in text or "Unsupported" in text:
        return f"not a checkpoint of plain tensors in pickle protocol 2, without code, which is never run; {_CURE}"
    return f"truncated or not a PyTorch checkpoint ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
