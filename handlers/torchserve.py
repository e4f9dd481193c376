"""TorchServe's handler, which answers batches with a `Service`.

TorchServe uses the class that this file defines, and refuses a file with two classes.
"""

import gc
import logging
import os
import socket
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from handlers import metrics
from handlers.answer import Response
from handlers.fields import read_strict
from handlers.pipeline import Pipeline
from handlers.service import Service
from handlers.settings import HandlerSettings

BUNDLE = "bundle"
FAILED = "mlvgm cannot serve this bundle"  # `mlvgm serve` looks for this line in the log
THREADS_VARIABLE = "MLVGM_THREADS"
PROBE_HEADER = "X-Readiness-Probe"
"""Header of a readiness probe: it is answered, but not counted in the metrics."""

logger = logging.getLogger(__name__)


class PurifierHandler:
    """Loads the bundle in the archive, and answers batches."""

    def initialize(self, context: Any) -> None:
        """Load, warm up and self-test; called once per worker.

        Raises:
            Exception: the bundle cannot be served. The worker ends, and TorchServe restarts it later.
        """
        try:
            given = context.model_yaml_config.get("handler") or {}
            settings = read_strict(HandlerSettings, given, "model yaml: handler")
            threads = int(os.environ.get(THREADS_VARIABLE, settings.threads))
            folder = Path(context.system_properties["model_dir"]) / BUNDLE
            device = context.system_properties.get("gpu_id") or 0
            pipeline = Pipeline.load(folder, settings.runtime, threads, device)
            self._metric_lines: list[str] = []
            self._service = Service(pipeline, settings, sink(context, self._metric_lines))
            self._service.self_test()
            self._unmeasured = Service(pipeline, settings)  # who knows the header must not get around the settings
            self._write_metrics()
            gc.freeze()  # loaded objects stay, so the garbage collector need not visit them
            logger.info("serving %s %s with %s", pipeline.manifest.name, pipeline.manifest.version, pipeline.runtime)
        except Exception as error:
            logger.error("%s: %s", FAILED, str(error).replace("\n", " "))
            raise

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """One body per request, in order. Sets status, content type and headers on ``context``."""
        requests = [(fields, context.get_all_request_header(i)) for i, fields in enumerate(data)]
        answers: dict[int, Response] = {}
        for service, marked in ((self._service, False), (self._unmeasured, True)):
            if places := [i for i, (_, headers) in enumerate(requests) if (PROBE_HEADER in headers) == marked]:
                answers |= zip(places, service.answer([requests[i] for i in places]), strict=True)
        self._write_metrics()
        for i, answer in answers.items():
            if not requests[i][1]:  # only gRPC has no headers; its streaming call waits for a last part
                context.set_response_header(i, "ts_stream_next", "false")
            # The reason phrase must be ASCII: otherwise the answers of the whole batch are lost.
            context.set_response_status(answer.status, HTTPStatus(answer.status).phrase, i)
            context.set_response_content_type(i, answer.content_type)
            for name, value in answer.headers.items():
                context.set_response_header(i, name, value)
        return [answers[i].body for i in range(len(data))]

    def _write_metrics(self) -> None:
        if self._metric_lines:
            logger.info("\n".join(self._metric_lines))
            self._metric_lines.clear()


def sink(context: Any, lines: list[str]) -> metrics.Sink:
    """A sink that adds metrics to ``lines`` for TorchServe, if its metrics configuration declares them.

    TorchServe reads metrics from lines of the worker's output (deploy/metrics.yaml). Its own function logs each value
    separately, which takes 20 microseconds, and a request has a dozen.
    """
    declared = {name: metric for group in context.metrics.cache.values() for name, metric in group.items()}
    host = socket.gethostname()
    formats = {}
    for measure in metrics.MEASURES:
        known = {measure.label: "{label}", "ModelName": context.model_name, "Level": "Model"}
        if measure.name not in declared:
            continue
        metric = declared[measure.name]
        if unknown := [name for name in metric.dimension_names if name not in known]:
            logger.warning("%s is declared with the dimension %s, which it has not", measure.name, unknown[0])
            continue
        labels = ",".join(f"{name}:{known[name]}" for name in metric.dimension_names)
        formats[measure] = (
            f"[METRICS]{measure.name}.{metric.unit}:{{value}}|#{labels}|"
            f"#type:{metric.metric_type.name}|#hostname:{host},{{now}}"
        )

    def write(measure: metrics.Measure, value: float, label: str) -> None:
        if measure in formats:
            lines.append(formats[measure].format(value=round(value, 6), label=label, now=int(time.time())))

    return write
