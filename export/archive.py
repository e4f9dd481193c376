"""The ``.mar`` archive: a bundle, the server code that runs it, and the model's settings, all that TorchServe needs."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml

import handlers
from handlers import runtimes
from handlers.errors import MlvgmError
from handlers.fields import Range, read_strict
from handlers.manifest import FILE_NAME, Manifest
from handlers.settings import HandlerSettings
from handlers.torchserve import BUNDLE
from mlvgm.files import scratch

QUEUED_CALLS = 4
"""Length of TorchServe's queue, in full engine calls: an accepted request waits for these and the running one."""
ROWS_ON_CPU = 16
"""Rows per batch on a CPU: more gain little throughput, and all answers of a batch wait for its last row."""

FORMATS = {"zip-store": ".mar", "default": ".mar", "tgz": ".tar.gz", "no-archive": ""}


class ArchiveError(MlvgmError):
    """The archive cannot be built."""


@dataclass(frozen=True)
class ArchiveSettings(HandlerSettings):
    """The content of the model's YAML file: TorchServe's settings, and those of the handler.

    Attributes:
        batch_size: requests per batch; 0 for as many as fill an engine call with their default samples, or on a CPU
            make `ROWS_ON_CPU` rows.
        batch_delay_ms: how long a request waits for others to join its batch. On an idle server every answer takes at
            least this long; requests that arrive while a batch runs are batched anyway. TorchServe reads 0 as its
            default of 100 ms.
        queue: requests that may wait; when the queue is full, further ones get 503 at once. 0 for as many as fill
            `QUEUED_CALLS` engine calls with their default samples.
        response_timeout_s: a worker whose batch takes longer is killed and started again.
        startup_timeout_s: time to check, load and warm up the model.
    """

    batch_size: Annotated[int, Range(0, 65_536)] = 0
    batch_delay_ms: Annotated[int, Range(1, 60_000)] = 2
    queue: Annotated[int, Range(0, 1_000_000)] = 0
    response_timeout_s: Annotated[int, Range(1, 86_400)] = 120
    startup_timeout_s: Annotated[int, Range(1, 86_400)] = 600


def build_archive(
    bundle: str | Path, out: str | Path, settings: ArchiveSettings | None = None, archive_format: str = "zip-store"
) -> Path:
    """Check ``bundle`` and pack it into the folder ``out``; returns the path of the archive, replaced if it was there.

    Raises:
        BundleError: the bundle is damaged or inconsistent.
        FieldError: a setting is out of its range.
        ArchiveError: torch-model-archiver is not installed or fails.
    """
    bundle, out = Path(bundle), Path(out)
    settings = read_strict(ArchiveSettings, dataclasses.asdict(settings or ArchiveSettings()))
    if importlib.util.find_spec("model_archiver") is None:
        raise ArchiveError("torch-model-archiver is not installed: pip install torch-model-archiver==0.12.0")
    manifest = Manifest.read(bundle)
    if settings.suspicious != "pass" and manifest.score is None:
        raise ArchiveError(f"{bundle}: has no threshold of the attack score: run mlvgm tune --score 0.01 first")
    out.mkdir(parents=True, exist_ok=True)
    # The archiver first deletes $TMPDIR/<model name>: give it an empty folder of its own.
    with scratch(out) as work:
        _gather(manifest, bundle, work / "content")
        (work / "model.yaml").write_text(_model_yaml(manifest, settings))
        (work / "tmp").mkdir()
        (work / "made").mkdir()
        _run_archiver(manifest, work, archive_format)
        name = f"{manifest.name}{FORMATS[archive_format]}"
        target = out / name
        if target.is_dir():
            target.rename(work / "old")
        os.replace(work / "made" / name, target)
    return target


def fitting_batch(manifest: Manifest, runtime: str = "auto") -> int:
    """Requests of one image, with default samples, per batch; see `ArchiveSettings.batch_size`."""
    full = _full_call(manifest, runtime)
    return min(full, -(-ROWS_ON_CPU // manifest.samples.typical)) if _on_cpu(manifest, runtime) else full


def fitting_queue(manifest: Manifest, runtime: str = "auto", batch_size: int = 0) -> int:
    """Requests that may wait: `QUEUED_CALLS` full engine calls, or batches of ``batch_size`` if these are larger."""
    return QUEUED_CALLS * max(batch_size, _full_call(manifest, runtime))


def _full_call(manifest: Manifest, runtime: str) -> int:
    """Requests of one image, with default samples, that fill an engine call."""
    return -(-manifest.batch.most(_on_cpu(manifest, runtime)) // manifest.samples.typical)


def _on_cpu(manifest: Manifest, runtime: str) -> bool:
    return (manifest.runtime if runtime == "auto" else runtime) in ("auto", *runtimes.ON_CPU)


def _gather(manifest: Manifest, bundle: Path, content: Path) -> None:
    """Lay out the content of the archive. Files of the bundle are symlinks, which the archiver follows."""
    source = Path(next(iter(handlers.__path__)))
    shutil.copytree(source, content / "handlers", ignore=shutil.ignore_patterns("__pycache__", "client.py", "reply.py"))
    for name in (FILE_NAME, *manifest.files):
        link = content / BUNDLE / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((bundle / name).resolve())


def _model_yaml(manifest: Manifest, settings: ArchiveSettings) -> str:
    batch_size = settings.batch_size or fitting_batch(manifest, settings.runtime)
    queue = settings.queue or fitting_queue(manifest, settings.runtime, batch_size)
    return yaml.safe_dump(
        {
            "minWorkers": 1,
            "maxWorkers": 1,
            "batchSize": batch_size,
            "maxBatchDelay": settings.batch_delay_ms,
            "jobQueueSize": queue,
            "responseTimeout": settings.response_timeout_s,
            "startupTimeout": settings.startup_timeout_s,
            "handler": {field.name: getattr(settings, field.name) for field in dataclasses.fields(HandlerSettings)},
        },
        sort_keys=False,
    )


def _run_archiver(manifest: Manifest, work: Path, archive_format: str) -> None:
    command = [sys.executable, "-m", "model_archiver.model_packaging"]
    command += ["--model-name", manifest.name, "--version", manifest.version]
    command += ["--handler", "content/handlers/torchserve.py", "--extra-files", "content"]
    command += ["--config-file", "model.yaml", "--export-path", "made", "--archive-format", archive_format, "--force"]
    environment = {**os.environ, "TMPDIR": str((work / "tmp").resolve())}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ArchiveError(f"torch-model-archiver failed: {reason}")
