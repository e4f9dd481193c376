"""Answer batches of requests; common to all servers. An image that fails does not affect the others of its batch."""

import functools
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from handlers import certify, cores, limits, metrics
from handlers.answer import Outcome, Response, describe, refusal, respond
from handlers.arrival import queue_seconds
from handlers.engine_calls import NonFiniteError
from handlers.errors import InputError
from handlers.image import ImageError, Pixels, decode, encode_png, is_costly
from handlers.manifest import AUTO
from handlers.noise import fresh_seeds
from handlers.pipeline import Pipeline
from handlers.request import Request, RequestError, parse
from handlers.result import Result
from handlers.settings import DEFAULTS, HandlerSettings

_MOST_READERS = 4  # threads that decode images
_READING_BYTES = 1 << 30  # the largest images that are accepted, read together, take a third of it
_WORTH_THREADS = 32_768  # bytes of the encoded images of a batch, measured

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Decoded:
    """A decoded image.

    Attributes:
        place: its index among all images of the batch.
        pixels: uint8 (H, W, 3).
    """

    place: int
    request: Request
    pixels: Pixels
    seed: int
    decode_ms: float


class Service:
    """Answers batches of requests with one pipeline.

    Args:
        settings: which requests are accepted; ``runtime`` and ``threads`` are the pipeline's, and not used here.
        sink: takes the metrics.

    Raises:
        InputError: suspicious images are to be reviewed or refused, but the bundle has no threshold.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        settings: HandlerSettings = DEFAULTS,
        sink: metrics.Sink = metrics.nowhere,
    ) -> None:
        policy = settings.suspicious
        if policy != "pass" and pipeline.manifest.score is None:
            raise InputError(f"suspicious images cannot be told for {policy!r}: run mlvgm tune --score 0.01 first")
        self._pipeline = pipeline
        self._settings = settings
        self._measure = sink
        self._readers = _readers()
        for measure, labels in self._counters().items():
            for label in labels:
                sink(measure, 0, label)

    def answer(self, requests: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Response]:
        """One response for each (fields, headers), the arguments of `handlers.request.parse`, in the same order.

        Never raises: a wrong request gets a 400, and an internal error becomes a 500.
        """
        start = time.perf_counter()
        parsed = self._apart([self._parse(fields, headers) for fields, headers in requests])
        purified = iter(self.purify([request for request in parsed if isinstance(request, Request)]))
        manifest = self._pipeline.manifest
        responses = [
            respond(request, next(purified), manifest)
            if isinstance(request, Request)
            else respond(None, [request], manifest)
            for request in parsed
        ]
        for status, count in Counter(response.status for response in responses).items():
            self._measure(metrics.ANSWERS, count, str(status))
        taken = time.perf_counter() - start
        for _ in responses:
            self._measure(metrics.REQUEST, taken, "")
        return responses

    def purify(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        """The outcomes for the images of each request, in order. Never raises."""
        outcomes: dict[int, Outcome] = {}
        groups: defaultdict[tuple[int | str, str], list[_Decoded]] = defaultdict(list)
        with limits.memory(_READING_BYTES):
            decoded = list(self._decode_all(requests))
        for place, image in enumerate(decoded):
            if isinstance(image, Outcome):
                outcomes[place] = image
            else:
                groups[image.request.samples, image.request.alphas].append(image)
        for (samples, alphas), images in groups.items():
            outcomes |= self._run(images, samples, alphas, self._pipeline)
        in_order = (outcomes[place] for place in range(len(outcomes)))
        return [[next(in_order) for _ in request.images] for request in requests]

    def self_test(self) -> None:
        """Warm up as many batch sizes as answers need (`Pipeline.warm_up_behind`), then answer one request.

        Raises:
            RuntimeError: the pipeline cannot be run or its answer is not 200.
        """
        self._pipeline.warm_up_behind()
        self.probe()

    def probe(self) -> None:
        """Answer one request of one sample, which the metrics do not count.

        Raises:
            RuntimeError: its answer is not 200.
        """
        height, width = self._pipeline.manifest.image_size
        gray = encode_png(np.full((3, height, width), 0.5, np.float32))
        (response,) = Service(self._pipeline).answer([({"body": gray}, {"X-Mlvgm-Samples": "1"})])
        if response.status != 200:
            raise RuntimeError(f"self-test failed: {response.body.decode()}")

    def _parse(self, fields: Mapping[str, Any], headers: Mapping[str, Any]) -> Request | Outcome:
        try:
            if (queued := queue_seconds(headers)) is not None:
                self._measure(metrics.QUEUE, queued, "")
                if queued > self._settings.max_wait_s:
                    return self._refuse("late", 503, "the server is busy: try again later")
            settings = self._settings
            return parse(fields, headers, self._pipeline.manifest, settings.allow_seed, settings.certify_draws)
        except RequestError as error:
            return self._refuse("request", 400, str(error))
        except Exception:
            logger.exception("a request could not be read")
            return self._refuse("internal", 500, "the request could not be read")

    def _apart(self, batch: list[Request | Outcome]) -> list[Request | Outcome]:
        """``batch`` without costly requests of clients that share the workers, beside those of others.

        All answers of a batch wait for its last one.
        """
        if len({request.client for request in batch if isinstance(request, Request)}) < 2:
            return batch
        reason = "the request takes long, and others were in its batch: send it again"
        return [
            self._refuse("shared", 503, reason)
            if isinstance(request, Request) and request.client and self._is_costly(request)
            else request
            for request in batch
        ]

    def _is_costly(self, request: Request) -> bool:
        """Whether a request takes longer than one image of ordinary size can, whatever its samples."""
        most = self._pipeline.manifest.samples.max
        samples = most if request.samples == AUTO else int(request.samples)
        count = len(request.images)
        return count * samples + request.certify > most or any(is_costly(image, count) for image in request.images)

    def _decode_all(self, requests: Sequence[Request]) -> Iterator[_Decoded | Outcome]:
        owners = [(request, i) for request in requests for i in range(len(request.images))]
        size = sum(len(request.images[i]) for request, i in owners)
        # Decoders release the GIL, but for small images threads cost more than they save.
        each = self._readers.map if size >= _WORTH_THREADS and len(owners) > 1 else map
        return iter(each(self._decode, range(len(owners)), *zip(*owners, strict=True))) if owners else iter(())

    def _decode(self, place: int, request: Request, i: int) -> _Decoded | Outcome:
        start = time.perf_counter()
        try:
            pixels = decode(request.images[i], self._pipeline.manifest.image_size, len(request.images))
        except ImageError as error:
            return self._refuse("image", 400, str(error))
        except Exception:
            logger.exception("an image could not be read")
            return self._refuse("internal", 500, "the image could not be read")
        seed = fresh_seeds(1)[0] if request.seed is None else request.seed + i
        return _Decoded(place, request, pixels, seed, (time.perf_counter() - start) * 1000)

    def _run(self, images: list[_Decoded], samples: int | str, alphas: str, pipeline: Pipeline) -> dict[int, Outcome]:
        """Outcomes by index. Images do not depend on each other, so if some overflow, the others are run again."""
        outcomes: dict[int, Outcome] = {}
        while images:
            try:
                pixels, seeds = np.stack([image.pixels for image in images]), [image.seed for image in images]
                result = pipeline.run(pixels, samples, seeds, alphas=alphas)
                self._measure_run(result)
                return outcomes | {image.place: self._answer(image, result, i) for i, image in enumerate(images)}
            except NonFiniteError as error:
                logger.error("%s", error)
                broken = [images[i] for i in error.items]
                images = [image for i, image in enumerate(images) if i not in error.items]
                if fallback := pipeline.fallback:
                    self._measure(metrics.FALLBACKS, len(broken), error.stage)
                    outcomes |= self._run(broken, samples, alphas, fallback)
                else:
                    reason = f"stage {error.stage} overflowed on this image"
                    outcomes |= {image.place: self._refuse("overflow", 500, reason) for image in broken}
            except Exception:
                logger.exception("a batch of %d images could not be purified", len(images))
                reason = "the image could not be purified"
                return outcomes | {image.place: self._refuse("internal", 500, reason) for image in images}
        return outcomes

    def _answer(self, image: _Decoded, result: Result, i: int) -> Outcome:
        try:
            return self._describe(image, result, i)
        except Exception:  # a certificate computes for itself, and may run out of memory
            logger.exception("an image could not be answered")
            return self._refuse("internal", 500, "the image could not be answered")

    def _describe(self, image: _Decoded, result: Result, i: int) -> Outcome:
        manifest, more = self._pipeline.manifest, dict[str, Any]()
        if manifest.score is not None:
            more["suspicious"] = bool(result.scores[i] > manifest.score.threshold)
            if more["suspicious"]:
                self._measure(metrics.SUSPICIOUS, 1, "")
                if self._settings.suspicious == "refuse":
                    return self._refuse("suspicious", 422, "the image looks attacked: this server does not answer it")
            if self._settings.suspicious == "review":
                more["review"] = more["suspicious"]
        if image.request.certify:
            request, sigma, alpha = image.request, self._settings.certify_sigma, self._settings.certify_alpha
            certified = self._pipeline.certify(image.pixels[None], sigma, request.certify, alpha, request.alphas)
            more |= certify.answer(certified, 0, manifest.classes)
        return describe(result, i, image.request, manifest.classes, image.decode_ms, more)

    def _refuse(self, metric_label: str, status: int, reason: str) -> Outcome:
        self._measure(metrics.REJECTED, 1, metric_label)
        return refusal(status, reason)

    def _measure_run(self, result: Result) -> None:
        for stage, milliseconds in result.timing_ms.items():
            self._measure(metrics.STAGE, milliseconds / 1000, stage)
        self._measure(metrics.BATCH, len(result.labels), "")
        self._measure(metrics.SAMPLES, int(result.samples.sum()), "")
        for score in result.scores:
            self._measure(metrics.SCORE, float(score), "")
        for measure, images in ((metrics.FLAGGED, result.flagged), (metrics.DISAGREED, result.agreement < 1)):
            if count := int(np.count_nonzero(images)):
                self._measure(measure, count, "")

    def _counters(self) -> dict[metrics.Measure, tuple[str, ...]]:
        """What is said to be 0 at first, so that the first event shows as growth, and the values of its label."""
        stages = tuple(stage.name for stage in self._pipeline.manifest.stages)
        unlabelled = dict.fromkeys((metrics.FLAGGED, metrics.DISAGREED, metrics.SAMPLES, metrics.SUSPICIOUS), ("",))
        return {metrics.ANSWERS: ("200",), metrics.REJECTED: metrics.REASONS, metrics.FALLBACKS: stages, **unlabelled}


@functools.cache
def _readers() -> ThreadPoolExecutor:
    """Threads that decode images, all of them running: one that is started while memory is short hangs its starter."""
    count = min(cores.usable(), _MOST_READERS)
    pool, all_run = ThreadPoolExecutor(count, "reader"), threading.Barrier(count)
    list(pool.map(lambda _: all_run.wait(), range(count)))
    return pool
