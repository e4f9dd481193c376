"""What a server is measured with: encoded pictures with their correct labels, and the speed of the pipeline alone."""

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.server.calls import Call
from evaluation.photographs import encode, pictures
from export.archive import ArchiveSettings
from handlers.image import decode
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline

_PICTURES = 48


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is served, and how it is measured.

    Attributes:
        bundle: its folder.
        samples: purified samples of an image, or "auto".
        archive: settings of the server; its runtime and batch are also those of the pipeline in process.
        workers: of TorchServe.
        threads: of each worker; 0 for every core.
        images: folder of what is sent; None for synthetic pictures, whose votes are less often unanimous.
        seconds: of each load; saturation is measured in so many ``rounds`` of it.
        dev_server: compare with the development server.
    """

    bundle: Path
    samples: int | str
    archive: ArchiveSettings
    workers: int = 1
    threads: int = 0
    images: Path | None = None
    seconds: float = 10.0
    rounds: int = 3
    dev_server: bool = True


class Workload:
    """The pipeline in a process of its own, idle while servers are measured, and the requests for them."""

    def __init__(self, settings: BenchmarkSettings) -> None:
        self.settings = settings
        self.manifest = Manifest.read(settings.bundle)
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _load, (settings,))
        images = pictures(settings.images, _PICTURES, self.manifest.image_size)
        self._images = [encode(image, "JPEG" if i % 2 else "PNG") for i, image in enumerate(images)]
        self._labels: dict[int | str, list[int]] = {}

    def __enter__(self) -> "Workload":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    @property
    def runtime(self) -> str:
        """What the pipeline really runs on."""
        return self._pool.submit(_runtime).result()

    def images_per_s(self, seconds: float) -> float:
        """Of the pipeline alone, on decoded images, at the batch and samples of the settings; two calls at least."""
        return self._pool.submit(_rate, seconds).result()

    def calls(self, samples: int | str | None = None) -> Iterator[Call]:
        """Valid requests without end, for so many samples (default: those of the settings)."""
        samples = samples or self.settings.samples
        if samples not in self._labels:
            self._labels[samples] = self._pool.submit(_classify, self._images, samples).result()
        options = f"Content-Type: application/octet-stream\r\nX-Mlvgm-Samples: {samples}\r\nX-Mlvgm-Seed: "
        return cycle(
            Call(image, f"{options}{seed}\r\n".encode(), label)
            for seed, (image, label) in enumerate(zip(self._images, self._labels[samples], strict=True))
        )


_loaded: list[tuple[BenchmarkSettings, Pipeline]] = []
"""In the process of the pipeline."""


def _load(settings: BenchmarkSettings) -> None:
    pipeline = Pipeline.load(settings.bundle, settings.archive.runtime)
    pipeline.warm_up()
    _loaded.append((settings, pipeline))


def _runtime() -> str:
    return _loaded[0][1].runtime


def _rate(seconds: float) -> float:
    settings, pipeline = _loaded[0]
    batch = pictures(settings.images, settings.archive.batch_size, pipeline.manifest.image_size)
    calls, began = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - began < seconds:
        pipeline.run(batch, settings.samples)
        calls += 1
    return calls * len(batch) / (time.perf_counter() - began)


def _classify(images: list[bytes], samples: int | str) -> list[int]:
    """The label of each image, whose seed is its number."""
    settings, pipeline = _loaded[0]
    pixels = np.stack([decode(image, pipeline.manifest.image_size) for image in images])
    labels: list[int] = []
    for start in range(0, len(images), settings.archive.batch_size):
        part = pixels[start : start + settings.archive.batch_size]
        labels += pipeline.run(part, samples, range(start, start + len(part))).labels.tolist()
    return labels
