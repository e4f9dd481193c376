"""Requests in, answers out: what every server has in common. An item that fails never takes its neighbours with it."""

import json
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from handlers import cores, metrics, open_inference
from handlers.arrival import waited
from handlers.image import ImageError, decode, encode_png
from handlers.noise import fresh_seeds
from handlers.pipeline import NonFiniteError, Pipeline
from handlers.request import Request, parse
from handlers.result import Result
from handlers.strict_json import RequestError

_MOST_READERS = 4  # threads that decode images: each may hold one of the largest size
_WORTH_THREADS = 32_768  # bytes of the encoded images of a batch, measured

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """One HTTP answer. Headers are ASCII."""

    status: int
    content_type: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


Place = tuple[int, int]
"""Of an image: the request's in the batch, and its own in the request."""


@dataclass(frozen=True)
class _Item:
    """An image of a request, decoded to uint8 (H, W, 3)."""

    place: Place
    request: Request
    pixels: npt.NDArray[np.uint8]
    seed: int
    decode_ms: float


class Service:
    """Answers batches of requests with one pipeline.

    Args:
        allow_seed: let clients choose the noise.
        max_wait_s: a request that came longer ago is refused; it is known where a proxy says when that was.
        sink: takes what is measured.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        allow_seed: bool = False,
        max_wait_s: float = math.inf,
        sink: metrics.Sink = metrics.nowhere,
    ) -> None:
        self._pipeline = pipeline
        self._allow_seed = allow_seed
        self._max_wait_s = max_wait_s
        self._measure = sink
        self._readers = ThreadPoolExecutor(min(cores.usable(), _MOST_READERS), "reader")
        for measure, labels in self._counters().items():
            for label in labels:
                sink(measure, 0, label)

    def answer(self, requests: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Answer]:
        """One answer for each (fields, headers), as `handlers.request.parse` takes them, in the same order.

        Never raises: what is wrong with a request becomes its 400 answer, and what goes wrong here a 500.
        """
        start = time.perf_counter()
        answers: dict[Place, Answer] = {}
        parsed: dict[int, Request] = {}
        for position, (fields, headers) in enumerate(requests):
            request = self._parse(fields, headers)
            if isinstance(request, Answer):
                answers[position, 0] = request
                continue
            parsed[position] = request
        answers |= self._answer_images(parsed)
        whole = [
            self._whole(parsed[position], [answers[position, i] for i in range(len(parsed[position].images))])
            if position in parsed
            else answers[position, 0]
            for position in range(len(requests))
        ]
        for status, count in Counter(answer.status for answer in whole).items():
            self._measure(metrics.ANSWERS, count, str(status))
        taken = time.perf_counter() - start
        for _ in whole:
            self._measure(metrics.REQUEST, taken, "")
        return whole

    def purify(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer for each request, which has been read already and has one image; never raises, as `answer`."""
        answers = self._answer_images(dict(enumerate(requests)))
        return [answers[position, 0] for position in range(len(requests))]

    def self_test(self) -> None:
        """Warm every batch size up, then answer one request.

        Raises:
            RuntimeError: the pipeline cannot be run or its answer is not 200.
        """
        self._pipeline.warm_up()
        height, width = self._pipeline.manifest.image_size
        answer = Service(self._pipeline).answer(
            [({"body": encode_png(np.full((3, height, width), 0.5, np.float32))}, {})]
        )[0]
        if answer.status != 200:
            raise RuntimeError(f"self-test failed: {answer.body.decode()}")

    def _answer_images(self, parsed: Mapping[int, Request]) -> dict[Place, Answer]:
        answers: dict[Place, Answer] = {}
        groups: defaultdict[tuple[int | str, str], list[_Item]] = defaultdict(list)
        for place, item in self._read_all(parsed):
            if isinstance(item, Answer):
                answers[place] = item
            else:
                groups[item.request.samples, item.request.alphas].append(item)
        for (samples, alphas), items in groups.items():
            answers |= self._purify(items, samples, alphas, self._pipeline)
        return answers

    def _parse(self, fields: Mapping[str, Any], headers: Mapping[str, Any]) -> Request | Answer:
        try:
            if (wait := waited(headers)) is not None:
                self._measure(metrics.QUEUE, wait, "")
                if wait > self._max_wait_s:
                    return self._refuse("late", 503, "the server is busy: try again later")
            return parse(fields, headers, self._pipeline.manifest, self._allow_seed)
        except RequestError as error:
            return self._refuse("request", 400, str(error))
        except Exception:
            logger.exception("a request could not be read")
            return self._refuse("internal", 500, "the request could not be read")

    def _read_all(self, parsed: Mapping[int, Request]) -> Iterator[tuple[Place, _Item | Answer]]:
        places = [(position, i) for position, request in parsed.items() for i in range(len(request.images))]
        requests = [parsed[position] for position, _ in places]
        size = sum(len(request.images[i]) for request, (_, i) in zip(requests, places, strict=True))
        # Decoders let go of the interpreter, but handing them small images costs more than it saves.
        each = self._readers.map if size >= _WORTH_THREADS and len(places) > 1 else map
        return zip(places, each(self._read, places, requests), strict=True)

    def _read(self, place: Place, request: Request) -> _Item | Answer:
        start = time.perf_counter()
        try:
            pixels = decode(request.images[place[1]], self._pipeline.manifest.image_size, len(request.images))
        except ImageError as error:
            return self._refuse("image", 400, str(error))
        except Exception:
            logger.exception("an image could not be read")
            return self._refuse("internal", 500, "the image could not be read")
        seed = fresh_seeds(1)[0] if request.seed is None else request.seed + place[1]
        return _Item(place, request, pixels, seed, (time.perf_counter() - start) * 1000)

    def _purify(self, items: list[_Item], samples: int | str, alphas: str, pipeline: Pipeline) -> dict[Place, Answer]:
        """Answers by place. Items do not depend on each other, so those without a fault can simply be run again."""
        answers: dict[Place, Answer] = {}
        while items:
            try:
                images = np.stack([item.pixels for item in items])
                result = pipeline.run(images, samples, [item.seed for item in items], alphas=alphas)
                self._measure_run(result)
                return answers | {item.place: self._say(item, result, i) for i, item in enumerate(items)}
            except NonFiniteError as error:
                logger.error("%s", error)
                broken = [items[i] for i in error.items]
                items = [item for i, item in enumerate(items) if i not in error.items]
                if fallback := pipeline.fallback:
                    self._measure(metrics.FALLBACKS, len(broken), error.stage)
                    answers |= self._purify(broken, samples, alphas, fallback)
                else:
                    reason = f"stage {error.stage} overflowed on this image"
                    answers |= {item.place: self._refuse("overflow", 500, reason) for item in broken}
            except Exception:
                logger.exception("a batch of %d images could not be purified", len(items))
                reason = "the image could not be purified"
                return answers | {item.place: self._refuse("internal", 500, reason) for item in items}
        return answers

    def _refuse(self, reason: str, status: int, words: str) -> Answer:
        self._measure(metrics.REJECTED, 1, reason)
        headers = {"Retry-After": "1"} if status == 503 else {}
        return Answer(status, "application/json", json.dumps({"error": words, "status": status}).encode(), headers)

    def _measure_run(self, result: Result) -> None:
        for stage, milliseconds in result.timing_ms.items():
            self._measure(metrics.STAGE, milliseconds / 1000, stage)
        self._measure(metrics.BATCH, len(result.labels), "")
        for measure, count in (
            (metrics.FLAGGED, result.flagged.sum()),
            (metrics.DISAGREED, (result.agreement < 1).sum()),
        ):
            if count:
                self._measure(measure, int(count), "")

    def _counters(self) -> dict[metrics.Measure, tuple[str, ...]]:
        """What is said to be 0 at first, so that the first event shows as growth, and the values of its label."""
        stages = tuple(stage.name for stage in self._pipeline.manifest.stages)
        unlabelled = dict.fromkeys((metrics.FLAGGED, metrics.DISAGREED), ("",))
        return {metrics.ANSWERS: ("200",), metrics.REJECTED: metrics.REASONS, metrics.FALLBACKS: stages, **unlabelled}

    def _whole(self, request: Request, answers: Sequence[Answer]) -> Answer:
        """The answer to a request from those about its images."""
        if request.envelope is None:
            return _together(answers) if request.listed else answers[0]
        contents = [json.loads(answer.body) for answer in answers]
        status = _worst(answers)
        if status == 200:
            tensors = open_inference.answer(request.envelope, self._pipeline.manifest, contents)
            return Answer(200, "application/json", json.dumps(tensors).encode())
        # Tensors have no place for the error of one image, so the whole request fails.
        reasons = [f"image {i}: {content['error']}" for i, content in enumerate(contents) if "error" in content]
        body = {"error": "; ".join(reasons), "status": status}
        return Answer(status, "application/json", json.dumps(body).encode())

    def _say(self, item: _Item, result: Result, i: int) -> Answer:
        classes, request = self._pipeline.manifest.classes, item.request
        label, unpurified = int(result.labels[i]), int(result.unpurified_labels[i])
        figures = {
            "label": classes[label],
            "index": label,
            "confidence": _share(result.confidences[i, label]),
            "agreement": _share(result.agreement[i]),
            "flagged": bool(result.flagged[i]),
            "score": _share(result.scores[i]),
            "unpurified": {
                "label": classes[unpurified],
                "index": unpurified,
                "confidence": _share(result.unpurified_confidences[i, unpurified]),
            },
            "samples": int(result.samples[i]),
        }
        if request.wants_image:
            image = encode_png(result.representative(i))
            return Answer(200, "image/png", image, {"X-Mlvgm-Answer": json.dumps(figures)})
        figures["top_k"] = [
            {
                "label": classes[index],
                "index": int(index),
                "confidence": _share(result.confidences[i, index]),
                "votes": int(result.votes[i, index]),
            }
            for index in result.ranking[i, : request.top_k]
        ]
        # Of the whole batch that this request was part of: stages do not know whose row they work on.
        figures["timing_ms"] = {"image": round(item.decode_ms, 3)} | {
            k: round(v, 3) for k, v in result.timing_ms.items()
        }
        return Answer(200, "application/json", json.dumps(figures).encode())


def _together(answers: Sequence[Answer]) -> Answer:
    """The answers about the images of one request, in their order. It has failed when there is none that has not."""
    status = 200 if any(answer.status == 200 for answer in answers) else _worst(answers)
    entries = [json.loads(answer.body) for answer in answers]
    return Answer(status, "application/json", json.dumps({"answers": entries}).encode())


def _worst(answers: Sequence[Answer]) -> int:
    return max(answer.status for answer in answers)


def _share(value: np.floating[Any]) -> float:
    return round(float(value), 6)
