"""The pipeline: runs a bundle's stages on a batch of images. Servers, bulk commands and benchmarks use it.

It is independent of model families: the manifest declares the inputs and outputs of each stage. A stage that depends on
noise, directly or through another stage, runs once per sample, any other once per image. Noise that is multiplied by an
alpha of 0 does not count.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from handlers import runtimes, vote
from handlers.arrays import FloatArray, IntArray
from handlers.batching import buckets, chunks
from handlers.certify import Certified, certify
from handlers.engine_calls import EngineCalls, NonFiniteError, check_finite, joined
from handlers.inputs import PipelineInputs, checked_images
from handlers.manifest import Manifest
from handlers.plan import Plan, is_noise
from handlers.result import Result
from handlers.runtimes import Array, Engine, EngineOptions, choice, memory

PROGRESS = "getting ready:"  # `mlvgm serve` shows lines of a worker's log that contain this
_HAVE_FALLBACKS = (*runtimes.ON_CPU, "onnxruntime-cuda", "torch")  # load the fp32 graphs, or programs of them

logger = logging.getLogger(__name__)


class Pipeline:
    """The loaded stages of one bundle.

    >>> with Pipeline.load("build/road-signs") as pipeline:
    ...     result = pipeline.run(images, samples=8)
    """

    def __init__(
        self,
        manifest: Manifest,
        engines: Mapping[str, Engine],
        runtime: str,
        load_fallback: "Callable[[], Pipeline] | None" = None,
    ) -> None:
        self.manifest = manifest
        self.runtime = runtime
        self._engines = dict(engines)
        self._load_fallback = load_fallback
        self._fallback: Pipeline | None = None
        self._warming: threading.Thread | None = None
        self._closed = threading.Event()
        on_cpu = runtime in runtimes.ON_CPU
        self._buckets = buckets(manifest.batch, on_cpu)
        self._group = self._buckets[0]
        # An image is classified together with its samples, to save an engine call.
        self._classify_buckets = buckets(manifest.batch, on_cpu, 1 + manifest.samples.typical)
        self._plans: dict[bytes, Plan] = {}

    @classmethod
    def load(cls, folder: str | Path, runtime: str = "auto", threads: int = 0, device: int = 0) -> "Pipeline":
        """Check the bundle in ``folder``, then load its engines.

        Args:
            runtime: one of `handlers.runtimes.NAMES`; "auto" is the bundle's own choice, or else the one that
                has been measured to be the fastest here (`handlers.runtimes.choice`), or else usually is.
            threads: CPU threads; 0 for every core.
            device: number of the GPU, for the runtimes that use one.

        Raises:
            BundleError: the bundle is missing, damaged or inconsistent. No engine is loaded then.
            RuntimeMissing: the runtime is unknown or not installed.
            EngineError: the runtime refuses an engine.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        name = manifest.runtime if runtime == "auto" else runtime
        if name == "auto" and (measured := choice.kept(manifest)):
            logger.info("auto is %s", measured)
            name = measured.runtime
        name = runtimes.choose(name)
        usual = manifest.batch.opt, manifest.batch.max
        engines = _engines(name, folder, manifest, EngineOptions(threads, device, manifest.precision, compiled=usual))

        def fallback() -> Pipeline:
            # TensorRT engines are only built in half precision, so the fp32 graphs run on the CPU. Nothing is compiled:
            # an image waits for the answer.
            graphs = name if name in _HAVE_FALLBACKS else runtimes.choose("auto")
            options = EngineOptions(threads, device, "fp32")
            return cls(manifest, _engines(graphs, folder, manifest, options, True), graphs)

        in_half = any(stage.fallback for stage in manifest.stages) or (manifest.precision, name) == ("bf16", "openvino")
        return cls(manifest, engines, name, fallback if in_half else None)

    @property
    def fallback(self) -> "Pipeline | None":
        """This pipeline in fp32, for images on which half precision overflows; loaded at its first use.

        None if this pipeline computes in fp32, or the bundle's fp32 graphs are missing or cannot be loaded.
        """
        if self._load_fallback is not None:
            load, self._load_fallback = self._load_fallback, None
            try:
                self._fallback = load()
            except Exception:
                logger.exception("the stages cannot be loaded in fp32")
        return self._fallback

    def run(
        self,
        images: npt.ArrayLike,
        samples: int | str | None = None,
        seeds: Sequence[int] | None = None,
        noise: Sequence[npt.ArrayLike] | None = None,
        input_noise: npt.ArrayLike | None = None,
        alphas: str | Sequence[float] | None = None,
    ) -> Result:
        """Purify every image ``samples`` times and let the samples vote.

        Args:
            images: uint8 (B, H, W, 3), or float (B, 3, H, W) in [0, 1].
            samples: purified samples per image, 1 to the bundle's maximum K; "auto" draws up to K, until the image's
                vote is decided (`handlers.vote`); None for the bundle's default.
            seeds: one integer from 0 to 2^63 - 1 per image; None for fresh ones from the operating system.
            noise: replaces the drawn noise: per latent, coarse to fine, standard-normal (B * K, *noise_shapes[i]),
                where row b * K + k belongs to sample k of image b.
            input_noise: replaces the drawn input noise: standard-normal (B * K, 3, H, W).
            alphas: name of a schedule of the bundle, or n effective alphas in [0, 1]; None for the default schedule.

        Raises:
            InputError: an argument has the wrong shape, type or range.
            NonFiniteError: a stage returned NaN or infinity.
            EngineError: a stage cannot be run.
        """
        return self._run(PipelineInputs.of(self.manifest, images, samples, seeds, noise, input_noise, alphas))

    def classify(self, images: npt.ArrayLike) -> FloatArray:
        """The logits (B, C) of images (as for `run`) that are not purified.

        Raises:
            InputError, NonFiniteError, EngineError: as for `run`.
        """
        batch = checked_images(self.manifest, images)
        return self._classify([(np.arange(len(batch)), batch)], EngineCalls(self._engines, self.manifest.batch.min))

    def certify(
        self,
        images: npt.ArrayLike,
        sigma: float = 0.25,
        draws: int = 1000,
        alpha: float = 0.001,
        alphas: str | Sequence[float] | None = None,
    ) -> Certified:
        """Certified labels, which no change of an image within a radius can change; see `handlers.certify`.

        Args:
            images: as for `run`.
            sigma: standard deviation of the noise, per pixel of images in [0, 1].
            draws: counted noisy images per image, in addition to the few that choose its class.
            alpha: accepted probability, for each image, that its radius is too large.
            alphas: as for `run`.

        Raises:
            InputError, EngineError: as for `run`. A noisy image on which a stage overflows counts for no class.
        """
        checked, classes = checked_images(self.manifest, images), len(self.manifest.classes)
        return certify(lambda noisy: self._labels(noisy, alphas), checked, classes, sigma, draws, alpha, self._group)

    def warm_up(self) -> None:
        """Run every stage once at each batch size that requests can cause: first runs are slow.

        Raises:
            EngineError: a stage cannot be run at one of the sizes.
        """
        for i, size in enumerate(self._classify_buckets, 1):
            self._run_once(size, i)

    def warm_up_behind(self) -> None:
        """As `warm_up`, but return after the largest and the smallest size where engines can be run in several threads.

        The other sizes follow in a thread. Until a size is warm, batches are split into sizes that are, so no answer
        waits for a compiler. A size that fails is never used. Where a large engine takes any size after its first run,
        only the smallest is run: further ones would take seconds of computing each, to save hardly any.

        Raises:
            EngineError: a stage cannot be run at one of the sizes that are run before this returns.
        """
        if any(getattr(engine, "takes_any_size", False) for engine in self._engines.values()):
            self._run_once(self._classify_buckets[-1], 1)
            return
        if not all(getattr(engine, "takes_threads", False) for engine in self._engines.values()):
            self.warm_up()
            return
        whole = Pipeline(self.manifest, self._engines, self.runtime)
        largest, *rest = whole._classify_buckets
        sizes = [largest, *reversed(rest)]  # after these two, the smaller ones, which are asked for first
        self._use_sizes(whole, sizes[:2])
        for i, size in enumerate(sizes[:2], 1):
            whole._run_once(size, i)

        def follow() -> None:
            warm = set(sizes[:2])
            for i, size in enumerate(sizes[2:], 3):
                if self._closed.is_set():
                    return
                try:
                    whole._run_once(size, i)
                except Exception:
                    logger.exception("batches of %d rows fail: they are split", size)
                else:
                    warm.add(size)
                    self._use_sizes(whole, warm)

        self._warming = threading.Thread(target=follow, name="warm-up")
        self._warming.start()

    def _use_sizes(self, whole: "Pipeline", sizes: Collection[int]) -> None:
        """Make batches of ``sizes`` alone, as far as ``whole`` makes such."""
        self._buckets = [size for size in whole._buckets if size in sizes]
        self._classify_buckets = [size for size in whole._classify_buckets if size in sizes]

    def _run_once(self, size: int, i: int) -> None:
        """Run every stage with ``size`` rows, the ``i``-th of the sizes that are warmed up."""
        start, n = time.perf_counter(), len(self._classify_buckets)
        images = np.zeros((size, *self.manifest.image_size, 3), np.uint8)
        self.classify(images)
        if size in self._buckets:
            self.run(images, samples=1, seeds=range(size))
        logger.info("%s %d rows at once, %.1f s (%d of %d)", PROGRESS, size, time.perf_counter() - start, i, n)

    def with_stage(self, name: str, engine: Engine) -> "Pipeline":
        """This pipeline with another engine for the stage ``name``. It shares the others: close only one of the two."""
        return Pipeline(self.manifest, {**self._engines, name: engine}, self.runtime)

    def close(self) -> None:
        """Free the engines."""
        self._closed.set()
        if self._warming:
            self._warming.join()
        _close(self._engines)
        if self._fallback:
            self._fallback.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _labels(self, images: FloatArray, alphas: str | Sequence[float] | None) -> IntArray:
        """(B,): the class of one sample of each image; -1 where a stage overflows."""
        labels = np.full(len(images), -1)
        todo = np.arange(len(images))
        while len(todo):
            try:
                result = self._run(PipelineInputs.of(self.manifest, images[todo], 1, alphas=alphas), compare=False)
                labels[todo] = result.sample_labels[:, 0]
                break
            except NonFiniteError as error:
                broken, todo = todo[error.items], np.delete(todo, error.items)
                if self.fallback:
                    labels[broken] = self.fallback._labels(images[broken], alphas)
        return labels

    def _run(self, inputs: PipelineInputs, compare: bool = True) -> Result:
        """As `run`; the unpurified images are classified only with ``compare``."""
        count, most = len(inputs.images), inputs.samples
        sample_logits = np.full((count, most, len(self.manifest.classes)), np.nan, np.float32)
        unpurified_logits = np.full_like(sample_logits[:, 0], np.nan)
        made: list[tuple[IntArray, Array]] = []  # rows, and their purified images
        plan, calls = self._plan(inputs.alphas), EngineCalls(self._engines, self.manifest.batch.min)

        # In groups, so that few encoded images need to be kept.
        for items in np.split(np.arange(count), range(self._group, count, self._group)):
            encoded: dict[str, Array] = {}
            undecided, drawn = items, 0
            for stop in inputs.rounds:
                if drawn:
                    undecided = undecided[~vote.decided(sample_logits[undecided, :drawn], most)]
                if not len(undecided):
                    break
                rows = (undecided[:, None] * most + np.arange(drawn, stop)).ravel()
                parts = [rows[chunk] for chunk in chunks(0, len(rows), self._buckets)]
                # On a GPU, noise is drawn while the GPU encodes.
                ahead = self.runtime not in runtimes.ON_CPU
                noise = inputs.draw_each(self.manifest, parts, plan.noise, ahead)
                if drawn == 0:
                    encoded = self._encode(plan, inputs, items, calls)
                purified = list(self._purify(plan, inputs, encoded, zip(parts, noise, strict=True), items[0], calls))
                made += purified
                batches = [(some // most, images) for some, images in purified]
                if compare and drawn == 0:  # unpurified images are classified together with their first samples
                    batches.insert(0, (items, inputs.images[items]))
                logits = self._classify(batches, calls)
                sample_logits[rows // most, rows % most] = logits[-len(rows) :]
                if compare and drawn == 0:
                    unpurified_logits[items] = logits[: len(items)]
                drawn = stop
        longest = int((~np.isnan(sample_logits[:, :, 0])).any(axis=0).sum())

        def fetch() -> FloatArray:
            fetched = np.full((count, longest, *inputs.images.shape[1:]), np.nan, np.float32)
            for rows, images in made:
                fetched[rows // most, rows % most] = np.asarray(images)
            return fetched

        return Result(sample_logits[:, :longest], fetch, unpurified_logits, dict(calls.milliseconds))

    def _plan(self, alphas: FloatArray) -> Plan:
        key = (alphas != 0).tobytes()
        if key not in self._plans:
            self._plans[key] = Plan.of(self.manifest.stages[:-1], alphas)
        return self._plans[key]

    def _encode(self, plan: Plan, inputs: PipelineInputs, items: IntArray, calls: EngineCalls) -> dict[str, Array]:
        """The outputs of the per-image stages that per-sample stages need, for these images."""
        parts = []
        for chunk in chunks(int(items[0]), int(items[-1]) + 1, self._buckets):
            tensors: dict[str, Array] = {"images": inputs.images[chunk], "alphas": inputs.alphas}
            for stage in plan.per_image:
                for tensor in stage.inputs:
                    if is_noise(tensor.name):  # multiplied by 0
                        tensors[tensor.name] = np.zeros((len(chunk), *tensor.shape[1:]), np.float32)
                tensors |= calls.run(stage, tensors, chunk)
            parts.append(tensors)
        return {name: joined([part[name] for part in parts]) for name in plan.from_image}

    def _purify(
        self,
        plan: Plan,
        inputs: PipelineInputs,
        encoded: Mapping[str, Array],
        parts: Iterator[tuple[IntArray, dict[str, FloatArray]]],
        first: int,
        calls: EngineCalls,
    ) -> Iterator[tuple[IntArray, Array]]:
        """Rows and their purified images, of rows and their noise; row 0 of ``encoded`` is that of image ``first``."""
        while True:
            with calls.timed("noise"):
                part = next(parts, None)
            if part is None:
                return
            rows, noise = part
            owners = rows // inputs.samples
            tensors = {name: array[owners - first] for name, array in encoded.items()}
            tensors |= {"alphas": inputs.alphas, **noise}
            for stage in plan.per_sample:
                tensors |= calls.run(stage, tensors, owners)
            if not isinstance(tensors["images"], np.ndarray):
                check_finite(self.manifest.stages[-2].name, tensors["images"], owners)
            yield rows, tensors["images"]

    def _classify(self, batches: list[tuple[IntArray, Array]], calls: EngineCalls) -> FloatArray:
        """The logits of all ``batches``, each given as (index of the image that each row belongs to, rows)."""
        stage, parts = self.manifest.stages[-1], []
        if all(isinstance(images, np.ndarray) for _, images in batches):  # arrays on a device are not joined
            batches = [(np.concatenate([owners for owners, _ in batches]), joined([images for _, images in batches]))]
        for owners, images in batches:
            for rows in chunks(0, len(images), self._classify_buckets):
                logits = calls.run(stage, {"images": images[rows]}, owners[rows])["logits"]
                parts.append(np.asarray(logits))
                check_finite(stage.name, parts[-1], owners[rows])  # for the first time if they were on a device
        return np.concatenate(parts)


def _engines(
    runtime: str, folder: Path, manifest: Manifest, options: EngineOptions, in_fp32: bool = False
) -> dict[str, Engine]:
    """The engines of all stages of the bundle in ``folder``, by name; if one fails, the others are closed.

    Args:
        in_fp32: of stages in half precision, load the fallback.
    """
    files = {stage.name: (in_fp32 and stage.fallback) or stage.file for stage in manifest.stages}
    engines: dict[str, Engine] = {}
    try:
        # Of large ones the largest first: while it is loaded, its weights may be in memory twice.
        sizes = {stage: max(memory.of_weights(folder / file), memory.LARGE_BYTES) for stage, file in files.items()}
        for stage, file in sorted(files.items(), key=lambda item: -sizes[item[0]]):
            own = dataclasses.replace(options, digest=manifest.graph_digest(file))
            engines[stage] = runtimes.load(runtime, folder / file, own)
            logger.info("%s %s loaded in %s (%d of %d)", PROGRESS, file, runtime, len(engines), len(files))
    except Exception:
        _close(engines)
        raise
    return engines


def _close(engines: dict[str, Engine]) -> None:
    while engines:
        engines.popitem()[1].close()
