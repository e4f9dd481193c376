"""What is measured while serving, whatever server collects it. docs/metrics.md says what each is good for.

No value comes from a client: names, labels and their number are bounded by the bundle and this file.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One series of figures: a "counter" that only grows, or a "histogram" of single values.

    Attributes:
        label: name of the one label that tells its parts from each other; "" for none.
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

REASONS = ("request", "image", "late", "overflow", "internal", "suspicious")
"""Why something is not answered with 200: the request or an image of it cannot be read, it has waited for too long, a
stage overflows in fp32 too, something broke here, or it looks attacked and the operator has such images refused."""

Sink = Callable[[Measure, float, str], None]
"""Takes one value: what a counter grows by, or one value of a histogram, and the label's value or ""."""


def nowhere(_measure: Measure, _value: float, _label: str) -> None:
    """The sink of those who do not measure."""
