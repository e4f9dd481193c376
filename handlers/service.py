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


@dataclass(frozen=True)
class _Item:
    """A request whose image has been decoded to uint8 (H, W, 3)."""

    position: int
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
        answers: dict[int, Answer] = {}
        groups: defaultdict[tuple[int, str], list[_Item]] = defaultdict(list)
        for position, (fields, headers) in enumerate(requests):
            try:
                item = self._read(position, fields, headers)
                groups[item.request.samples, item.request.alphas].append(item)
            except (RequestError, ImageError) as error:
                answers[position] = _error(400, str(error))
            except Exception:
                logger.exception("a request could not be read")
                answers[position] = _error(500, "the request could not be read")
        for (samples, alphas), items in groups.items():
            answers |= self._purify(items, samples, alphas)
        return [answers[position] for position in range(len(requests))]

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

    def _read(self, position: int, fields: Mapping[str, Any], headers: Mapping[str, Any]) -> _Item:
        start = time.perf_counter()
        manifest = self._pipeline.manifest
        request = parse(fields, headers, manifest, self._allow_seed)
        pixels = decode(request.image, manifest.image_size)
        seed = fresh_seeds(1)[0] if request.seed is None else request.seed
        return _Item(position, request, pixels, seed, (time.perf_counter() - start) * 1000)

    def _purify(self, items: list[_Item], samples: int, alphas: str) -> dict[int, Answer]:
        """Answers by position. Items do not depend on each other, so those without a fault can simply be run again."""
        answers: dict[int, Answer] = {}
        while items:
            try:
                images = np.stack([item.pixels for item in items])
                result = self._pipeline.run(images, samples, [item.seed for item in items], alphas=alphas)
                return answers | {item.position: self._say(item, result, i) for i, item in enumerate(items)}
            except NonFiniteError as error:
                logger.error("%s", error)
                for i in error.items:
                    answers[items[i].position] = _error(500, f"stage {error.stage} overflowed on this image")
                items = [item for i, item in enumerate(items) if i not in error.items]
            except Exception:
                logger.exception("a batch of %d images could not be purified", len(items))
                return answers | {item.position: _error(500, "the image could not be purified") for item in items}
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


def _error(status: int, reason: str) -> Answer:
    return Answer(status, "application/json", json.dumps({"error": reason}).encode())


def _share(value: np.floating[Any]) -> float:
    return round(float(value), 6)
