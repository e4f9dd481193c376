"""Answers: an `Outcome` for each image, and a `Response` for each request."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from handlers import open_inference
from handlers.image import encode_png
from handlers.manifest import Manifest
from handlers.open_inference import Envelope
from handlers.request import Request
from handlers.result import Result


@dataclass(frozen=True)
class Outcome:
    """The result for one image: an answer or an error.

    Attributes:
        status: HTTP status; 200 for an answer.
        content: the answer, or "error" and "status", ready for JSON.
        purified: the purified image as PNG, if requested.
    """

    status: int
    content: dict[str, Any]
    purified: bytes | None = None


@dataclass(frozen=True)
class Response:
    """An HTTP response. Headers are ASCII."""

    status: int
    content_type: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, reason: str) -> Outcome:
    """The outcome of an image or request that is refused; ``reason`` is ASCII, and is sent to the client."""
    return Outcome(status, {"error": reason, "status": status})


def describe(
    result: Result, i: int, request: Request, classes: Sequence[str], decode_ms: float, more: Mapping[str, Any]
) -> Outcome:
    """The outcome for image ``i`` of ``result``, with the options of ``request``.

    Args:
        classes: class names, by index.
        decode_ms: milliseconds taken by decoding the image.
        more: further entries of the answer.
    """
    label, unpurified = int(result.labels[i]), int(result.unpurified_labels[i])
    content = {
        "label": classes[label],
        "index": label,
        "confidence": _rounded(result.confidences[i, label]),
        "agreement": _rounded(result.agreement[i]),
        "flagged": bool(result.flagged[i]),
        "score": _rounded(result.scores[i]),
        "unpurified": {
            "label": classes[unpurified],
            "index": unpurified,
            "confidence": _rounded(result.unpurified_confidences[i, unpurified]),
        },
        "samples": int(result.samples[i]),
        **more,
    }
    if request.wants_image:
        return Outcome(200, content, encode_png(result.representative(i)))
    content["top_k"] = [
        {
            "label": classes[index],
            "index": int(index),
            "confidence": _rounded(result.confidences[i, index]),
            "votes": int(result.votes[i, index]),
        }
        for index in result.ranking[i, : request.top_k]
    ]
    # For the whole batch that this request was part of: stages do not measure single rows.
    content["timing_ms"] = {"image": round(decode_ms, 3)} | {k: round(v, 3) for k, v in result.timing_ms.items()}
    return Outcome(200, content)


def respond(request: Request | None, outcomes: Sequence[Outcome], manifest: Manifest) -> Response:
    """The response to a request.

    Args:
        request: None if it could not be read; the only outcome then is the error.
        outcomes: those of its images, in order.
    """
    first, worst = outcomes[0], max(outcome.status for outcome in outcomes)
    if request is not None and isinstance(request.layout, Envelope):
        if worst == 200:
            answers = [outcome.content for outcome in outcomes]
            return _json(200, open_inference.answer(request.layout, manifest, answers))
        # The protocol has no errors per image, so the whole request fails.
        errors = [f"image {i}: {each.content['error']}" for i, each in enumerate(outcomes) if each.status != 200]
        return _json(worst, refusal(worst, "; ".join(errors)).content)
    if request is not None and request.layout == "list":
        status = 200 if any(outcome.status == 200 for outcome in outcomes) else worst
        return _json(status, {"answers": [outcome.content for outcome in outcomes]})
    if first.purified is not None:
        return Response(200, "image/png", first.purified, {"X-Mlvgm-Answer": json.dumps(first.content)})
    return _json(first.status, first.content)


def _json(status: int, content: dict[str, Any]) -> Response:
    headers = {"Retry-After": "1"} if status == 503 else {}
    return Response(status, "application/json", json.dumps(content).encode(), headers)


def _rounded(value: np.floating[Any]) -> float:
    return round(float(value), 6)
