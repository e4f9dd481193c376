"""Requests in, answers out: what every server has in common. An item that fails never takes its neighbours with it."""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from handlers.image import ImageError, decode, encode_png
from handlers.noise import fresh_seeds
from handlers.pipeline import NonFiniteError, Pipeline
from handlers.request import Request, RequestError, parse
from handlers.result import Result

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
    """Answers batches of requests with one pipeline."""

    def __init__(self, pipeline: Pipeline, allow_seed: bool = False) -> None:
        self._pipeline = pipeline
        self._allow_seed = allow_seed

    def answer(self, requests: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Answer]:
        """One answer for each (fields, headers), as `handlers.request.parse` takes them, in the same order.

        Never raises: what is wrong with a request becomes its 400 answer, and what goes wrong here a 500.
        """
        answers: dict[Place, Answer] = {}
        parsed: dict[int, Request] = {}
        groups: defaultdict[tuple[int, str], list[_Item]] = defaultdict(list)
        for position, (fields, headers) in enumerate(requests):
            try:
                request = parse(fields, headers, self._pipeline.manifest, self._allow_seed)
            except RequestError as error:
                answers[position, 0] = _error(400, str(error))
                continue
            except Exception:
                logger.exception("a request could not be read")
                answers[position, 0] = _error(500, "the request could not be read")
                continue
            parsed[position] = request
            for i in range(len(request.images)):
                try:
                    groups[request.samples, request.alphas].append(self._read((position, i), request))
                except ImageError as error:
                    answers[position, i] = _error(400, str(error))
                except Exception:
                    logger.exception("an image could not be read")
                    answers[position, i] = _error(500, "the image could not be read")
        for (samples, alphas), items in groups.items():
            answers |= self._purify(items, samples, alphas)
        return [
            _together([answers[position, i] for i in range(len(parsed[position].images))])
            if position in parsed and parsed[position].listed
            else answers[position, 0]
            for position in range(len(requests))
        ]

    def self_test(self) -> None:
        """Warm every batch size up, then answer one request.

        Raises:
            RuntimeError: the pipeline cannot be run or its answer is not 200.
        """
        self._pipeline.warm_up()
        height, width = self._pipeline.manifest.image_size
        answer = self.answer([({"body": encode_png(np.full((3, height, width), 0.5, np.float32))}, {})])[0]
        if answer.status != 200:
            raise RuntimeError(f"self-test failed: {answer.body.decode()}")

    def _read(self, place: Place, request: Request) -> _Item:
        start = time.perf_counter()
        pixels = decode(request.images[place[1]], self._pipeline.manifest.image_size)
        seed = fresh_seeds(1)[0] if request.seed is None else request.seed + place[1]
        return _Item(place, request, pixels, seed, (time.perf_counter() - start) * 1000)

    def _purify(self, items: list[_Item], samples: int, alphas: str) -> dict[Place, Answer]:
        """Answers by place. Items do not depend on each other, so those without a fault can simply be run again."""
        answers: dict[Place, Answer] = {}
        while items:
            try:
                images = np.stack([item.pixels for item in items])
                result = self._pipeline.run(images, samples, [item.seed for item in items], alphas=alphas)
                return answers | {item.place: self._say(item, result, i) for i, item in enumerate(items)}
            except NonFiniteError as error:
                logger.error("%s", error)
                for i in error.items:
                    answers[items[i].place] = _error(500, f"stage {error.stage} overflowed on this image")
                items = [item for i, item in enumerate(items) if i not in error.items]
            except Exception:
                logger.exception("a batch of %d images could not be purified", len(items))
                return answers | {item.place: _error(500, "the image could not be purified") for item in items}
        return answers

    def _say(self, item: _Item, result: Result, i: int) -> Answer:
        classes, request = self._pipeline.manifest.classes, item.request
        label, unpurified = int(result.labels[i]), int(result.unpurified_labels[i])
        figures = {
            "label": classes[label],
            "index": label,
            "confidence": _share(result.confidences[i, label]),
            "agreement": _share(result.agreement[i]),
            "flagged": bool(result.flagged[i]),
            "unpurified": {
                "label": classes[unpurified],
                "index": unpurified,
                "confidence": _share(result.unpurified_confidences[i, unpurified]),
            },
            "samples": request.samples,
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
    entries = [
        json.loads(answer.body) | ({} if answer.status == 200 else {"status": answer.status}) for answer in answers
    ]
    status = 200 if any(answer.status == 200 for answer in answers) else max(answer.status for answer in answers)
    return Answer(status, "application/json", json.dumps({"answers": entries}).encode())


def _error(status: int, reason: str) -> Answer:
    return Answer(status, "application/json", json.dumps({"error": reason}).encode())


def _share(value: np.floating[Any]) -> float:
    return round(float(value), 6)
