"""The ``.mar`` archive: a bundle, the server code that runs it, and the model's settings, all that TorchServe needs."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
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

QUEUED_CALLS = 4
"""Full calls of an engine that may wait: a request that is let in waits for these, and for what is being answered."""
ROWS_ON_CPU = 16
"""Of a batch: more bring little there, and all answers wait for the last of them (docs/metrics.md)."""

FORMATS = {"zip-store": ".mar", "default": ".mar", "tgz": ".tar.gz", "no-archive": ""}


class ArchiveError(MlvgmError):
    """The archive cannot be built."""


@dataclass(frozen=True)
class Settings(HandlerSettings):
    """What goes into the model's yaml file, the handler's own settings among it.

    Attributes:
        batch_size: requests that are answered together; 0 takes as many as fill an engine with their default samples,
            or make `ROWS_ON_CPU` rows.
        batch_delay_ms: how long a request waits for others to join its batch. It is a floor under every answer of a
            quiet server; requests that arrive while a batch runs are batched anyway. TorchServe takes 0 for its default
            of 100 ms.
        queue: requests that may wait; one more is answered 503 at once. 0 takes what fills an engine
            `QUEUED_CALLS` times with their default samples.
        response_timeout_s: a batch that takes longer costs its worker the life.
        startup_timeout_s: for checking, loading and warming up.
    """

    batch_size: Annotated[int, Range(0, 65_536)] = 0
    batch_delay_ms: Annotated[int, Range(1, 60_000)] = 2
    queue: Annotated[int, Range(0, 1_000_000)] = 0
    response_timeout_s: Annotated[int, Range(1, 86_400)] = 120
    startup_timeout_s: Annotated[int, Range(1, 86_400)] = 600


def build_archive(
    bundle: str | Path, out: str | Path, settings: Settings | None = None, archive_format: str = "zip-store"
) -> Path:
    """Check ``bundle`` and pack it into the folder ``out``; returns the path of the archive, replaced if it was there.

    Raises:
        BundleError: the bundle is damaged or inconsistent.
        FieldError: a setting is out of its range.
        ArchiveError: torch-model-archiver is not installed or fails.
    """
    bundle, out = Path(bundle), Path(out)
    settings = read_strict(Settings, dataclasses.asdict(settings or Settings()))
    if importlib.util.find_spec("model_archiver") is None:
        raise ArchiveError("torch-model-archiver is not installed: pip install torch-model-archiver==0.12.0")
    manifest = Manifest.read(bundle)
    if settings.suspicious != "pass" and manifest.score is None:
        raise ArchiveError(f"{bundle}: has no threshold of the attack score: run mlvgm tune --score 0.01 first")
    out.mkdir(parents=True, exist_ok=True)
    # The archiver deletes $TMPDIR/<model name> before it begins: give it a folder where nothing else can be.
    with tempfile.TemporaryDirectory(prefix=".archive-", dir=out) as scratch:
        work = Path(scratch)
        _gather(manifest, bundle, work / "content")
        (work / "model.yaml").write_text(_model_yaml(manifest, settings))
        (work / "tmp").mkdir()
        (work / "made").mkdir()
        _run_archiver(manifest, work, archive_format)
        name = f"{manifest.name}{FORMATS[archive_format]}"
        target = out / name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(work / "made" / name, target)
    return target


def fitting_batch(manifest: Manifest, runtime: str = "auto") -> int:
    """Requests of one image, with its default samples, that are worth answering together; more would only wait."""
    full = _full_call(manifest, runtime)
    return min(full, -(-ROWS_ON_CPU // manifest.samples.typical)) if _on_cpu(manifest, runtime) else full


def fitting_queue(manifest: Manifest, runtime: str = "auto", batch_size: int = 0) -> int:
    """Requests that may wait: what fills `QUEUED_CALLS` calls of an engine, or batches of ``batch_size`` if larger."""
    return QUEUED_CALLS * max(batch_size, _full_call(manifest, runtime))


def _full_call(manifest: Manifest, runtime: str) -> int:
    """Requests of one image, with its default samples, that fill a call of an engine."""
    return -(-manifest.batch.most(_on_cpu(manifest, runtime)) // manifest.samples.typical)


def _on_cpu(manifest: Manifest, runtime: str) -> bool:
    return (manifest.runtime if runtime == "auto" else runtime) in ("auto", *runtimes.ON_CPU)


def _gather(manifest: Manifest, bundle: Path, content: Path) -> None:
    """Lay out what the archive holds. Large files are only linked: the archiver follows links."""
    source = Path(next(iter(handlers.__path__)))
    shutil.copytree(source, content / "handlers", ignore=shutil.ignore_patterns("__pycache__", "client.py"))
    for name in (FILE_NAME, *manifest.files):
        link = content / BUNDLE / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((bundle / name).resolve())


def _model_yaml(manifest: Manifest, settings: Settings) -> str:
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
