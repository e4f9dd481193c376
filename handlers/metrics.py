"""Metrics of a server, independent of the kind of server; docs/metrics.md describes them.

Names and labels do not depend on requests, so the number of time series is bounded.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A metric: a "counter", which only grows, or a "histogram" of values.

    Attributes:
        label: name of its label; "" for none.
    """

    name: str
    kind: str
    unit: str
    label: str = ""


STAGE = Measure("mlvgm_stage_seconds", "histogram", "seconds", "stage")
REQUEST = Measure("mlvgm_request_seconds", "histogram", "seconds")
QUEUE = Measure("mlvgm_queue_seconds", "histogram", "seconds")
BATCH = Measure("mlvgm_batch_images", "histogram", "images")
ANSWERS = Measure("mlvgm_answers", "counter", "count", "status")
REJECTED = Measure("mlvgm_rejected", "counter", "count", "reason")
FLAGGED = Measure("mlvgm_flagged", "counter", "count")
DISAGREED = Measure("mlvgm_disagreed", "counter", "count")
FALLBACKS = Measure("mlvgm_fallbacks", "counter", "count", "stage")
SAMPLES = Measure("mlvgm_samples", "counter", "count")
SCORE = Measure("mlvgm_attack_score", "histogram", "nats")
SUSPICIOUS = Measure("mlvgm_suspicious", "counter", "count")

MEASURES = (STAGE, REQUEST, QUEUE, BATCH, ANSWERS, REJECTED, FLAGGED, DISAGREED, FALLBACKS, SAMPLES, SCORE, SUSPICIOUS)

REASONS = ("request", "image", "late", "shared", "overflow", "internal", "suspicious")
"""Why a request or image is not answered with 200: it cannot be read, was queued for too long, is costly and was in a
batch with requests of other clients, overflows in fp32 too, hit an internal error, or looks attacked and the operator
refuses such images."""

Sink = Callable[[Measure, float, str], None]
"""Takes a metric, a value (an increment of a counter, or a value of a histogram) and the label's value or ""."""


def nowhere(_measure: Measure, _value: float, _label: str) -> None:
    """A sink that drops all values."""
