"""Read the settings of a model archive before TorchServe does, which would only warn, and serve nothing."""

import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import yaml

from deploy.errors import CliError
from handlers import open_inference
from handlers.fields import Range, read_strict
from handlers.manifest import MAX_BYTES, Name
from handlers.runtimes import ON_CPU
from handlers.torchserve import BUNDLE

DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
"""What reading a zip file raises, beside OSError."""
_WRONG_CONTENT = (LookupError, ValueError, TypeError, AttributeError, yaml.YAMLError)


@dataclass(frozen=True)
class ServedModel:
    """The settings of a model archive that the supervisor and nginx need.

    Attributes:
        queue: length of the model's queue in TorchServe.
        batch_size: largest batch of a worker.
        metadata: name, version and tensors, in the format of the Open Inference Protocol.
        workers: number of its workers.
        runtime: see `handlers.runtimes`.
    """

    name: Name
    version: Name = "1.0"
    queue: Annotated[int, Range(1)] = 100
    batch_size: Annotated[int, Range(1)] = 1
    metadata: Mapping[str, Any] | None = None
    workers: int = 1
    runtime: str = "auto"

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the CPU."""
        return self.runtime in ("auto", *ON_CPU)


def read(archive: Path) -> ServedModel:
    """The model of an archive: a .mar, a .tar.gz or a folder.

    Raises:
        CliError: no such file, or not an archive.
    """
    if not archive.exists():
        raise CliError(f"{archive}: no such archive; build one with mlvgm archive BUNDLE")
    try:
        manifest, bundle = _entries(archive, ["MAR-INF/MANIFEST.json", f"{BUNDLE}/pipeline.json"])
        model = json.loads(manifest or b"")["model"]
        (settings,) = _entries(archive, [model.get("configFile", "no such file")])
        content = yaml.safe_load(settings) if settings else {}
        pipeline = json.loads(bundle) if bundle else {}
        runtime = content.get("handler", {}).get("runtime", "auto")
        served = {
            "name": model["modelName"],
            "version": model.get("modelVersion", "1.0"),
            "queue": content.get("jobQueueSize", 100),
            "batch_size": content.get("batchSize", 1),
            "metadata": open_inference.metadata(pipeline) if bundle else None,
            "runtime": pipeline.get("runtime", "auto") if runtime == "auto" else runtime,
        }
        return read_strict(ServedModel, served)
    except (OSError, tarfile.TarError, *DAMAGED, *_WRONG_CONTENT):
        raise CliError(
            f"{archive}: not a model archive, or damaged: build it again with mlvgm archive BUNDLE"
        ) from None


def _entries(archive: Path, names: Sequence[str]) -> list[bytes | None]:
    """The content of some files of an archive; None for a missing one."""
    if archive.is_dir():
        return [_read((archive / name).open("rb")) if (archive / name).is_file() else None for name in names]
    if not archive.name.endswith(".tar.gz"):
        with zipfile.ZipFile(archive) as zipped:
            return [_read(zipped.open(name)) if name in zipped.namelist() else None for name in names]
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            for name in names:
                if member.name.endswith(f"/{name}") and (stream := tar.extractfile(member)):
                    found[name] = _read(stream)
    return [found.get(name) for name in names]


def _read(stream: IO[bytes]) -> bytes:
    """The content of a small file, which may be packed: much of nothing takes little."""
    with stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError
    return content
