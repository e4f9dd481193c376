"""What is served: a bundle, encoded pictures for it with their right answers, and its speed without any server."""

import io
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.server.call import Call, image_call
from benchmarks.server.started import Started
from evaluation.photographs import pictures
from handlers.image import decode
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline

_PICTURES = 48


@dataclass(frozen=True)
class WorkloadSettings:
    """How a bundle is served and run in process.

    Attributes:
        bundle: its folder.
        samples: purified samples of an image, or "auto".
        batch: images a call.
        runtime: as for `Pipeline.load`.
        threads: CPU threads; 0 for every core.
        images: folder of what is sent; None for synthetic pictures, whose votes are less often unanimous.
    """

    bundle: Path
    samples: int | str
    batch: int
    runtime: str = "auto"
    threads: int = 0
    images: Path | None = None


class Workload(Started):
    """The pipeline in a process of its own, idle while servers are measured, and what to ask them."""

    def __init__(self, settings: WorkloadSettings) -> None:
        self.settings = settings
        self.manifest = Manifest.read(settings.bundle)
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _load, (settings,))
        images = pictures(settings.images, _PICTURES, self.manifest.image_size)
        self._images = [_encoded(image, "JPEG" if i % 2 else "PNG") for i, image in enumerate(images)]
        self._labels: dict[int | str, list[int]] = {}

    def stop(self) -> None:
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
            self._labels[samples] = self._pool.submit(_answers, self._images, samples).result()
        calls = []
        for seed, (image, label) in enumerate(zip(self._images, self._labels[samples], strict=True)):
            calls.append(image_call(image, label, {"Samples": samples, "Seed": seed}))
        return cycle(calls)


def _encoded(image: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


_loaded: list[tuple[WorkloadSettings, Pipeline]] = []
"""In the process of the pipeline: the pipeline."""


def _load(settings: WorkloadSettings) -> None:
    pipeline = Pipeline.load(settings.bundle, settings.runtime, settings.threads)
    pipeline.warm_up()
    _loaded.append((settings, pipeline))


def _runtime() -> str:
    return _loaded[0][1].runtime


def _rate(seconds: float) -> float:
    settings, pipeline = _loaded[0]
    batch = pictures(settings.images, settings.batch, pipeline.manifest.image_size)
    calls, begun = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - begun < seconds:
        pipeline.run(batch, settings.samples)
        calls += 1
    return calls * len(batch) / (time.perf_counter() - begun)


def _answers(images: list[bytes], samples: int | str) -> list[int]:
    """The label of each image, whose seed is its number."""
    settings, pipeline = _loaded[0]
    labels: list[int] = []
    for start in range(0, len(images), settings.batch):
        part = [decode(image, pipeline.manifest.image_size) for image in images[start : start + settings.batch]]
        seeds = range(start, start + len(part))
        labels += pipeline.run(np.stack(part), samples, seeds).labels.tolist()
    return labels
