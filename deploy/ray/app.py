"""The purifier on Ray Serve, on all machines of a cluster, with the paths, requests and answers of the other servers.

    pip install -e '.[scale]'
    serve run deploy/ray/serve.yaml

Ray's HTTP proxy has no authentication: run it behind nginx, like TorchServe. docs/scale.md says what listens where.
"""

import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import metrics as ray_metrics
from starlette.applications import Starlette

from deploy.dev_server import Batches, routes
from handlers import metrics
from handlers.pipeline import Pipeline
from handlers.service import Service
from handlers.settings import HandlerSettings

CHECK_PERIOD_S, CHECK_TIMEOUT_S = 10.0, 30.0
_BOUNDARIES = {
    "seconds": [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0],
    "images": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
    "nats": [0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0],
}


@serve.deployment(health_check_period_s=CHECK_PERIOD_S, health_check_timeout_s=CHECK_TIMEOUT_S)
@serve.ingress()
class Purifier:
    """A replica: one pipeline with its engines. Ray runs as many replicas as the load needs.

    Args:
        bundle: folder of the bundle, the same on every machine.
        runtime: see `Pipeline.load`.
        threads: CPU threads; give the deployment as many ``num_cpus``.
        allow_seed: let clients choose the seed.
        batch: largest number of requests per batch.
    """

    def __init__(self, bundle: str, runtime: str = "auto", threads: int = 1, allow_seed: bool = False, batch: int = 8):
        pipeline = Pipeline.load(bundle, runtime, threads)
        self._manifest = pipeline.manifest
        settings = HandlerSettings(allow_seed=allow_seed)
        self._service = Service(pipeline, settings, sink(pipeline.manifest.name))
        self._service.self_test()
        self._checked = time.monotonic()
        self._batches = Batches(self._service.answer, batch, delay_s=0.002)

    def __serve_build_asgi_app__(self) -> Starlette:
        """What Ray sends this replica's requests to; asked for once, after the constructor."""
        return routes(self._manifest, self._batches, self._is_ready)

    async def check_health(self) -> None:
        """Answer a request. Where that fails or takes longer than `CHECK_TIMEOUT_S`, Ray replaces the replica."""
        await self._batches.between(self._service.probe)
        self._checked = time.monotonic()

    def _is_ready(self) -> bool:
        return time.monotonic() - self._checked < CHECK_PERIOD_S + CHECK_TIMEOUT_S


def sink(model: str) -> metrics.Sink:
    """A sink that hands metrics to Ray, which exports them as ray_mlvgm_... with labels of its own as well."""
    made: dict[metrics.Measure, Any] = {}
    for measure in metrics.MEASURES:
        kind = ray_metrics.Counter if measure.kind == "counter" else ray_metrics.Histogram
        buckets = {} if measure.kind == "counter" else {"boundaries": _BOUNDARIES[measure.unit]}
        labels = ("ModelName", *filter(None, [measure.label]))
        made[measure] = kind(measure.name, f"in {measure.unit}: see docs/metrics.md", tag_keys=labels, **buckets)

    def write(measure: metrics.Measure, value: float, label: str) -> None:
        tags = {"ModelName": model} | ({measure.label: label} if measure.label else {})
        if measure.kind == "histogram":
            made[measure].observe(value, tags)
        elif value > 0:  # Ray's counters begin with their first event
            made[measure].inc(value, tags)

    return write


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application of serve.yaml; ``arguments`` are those of `Purifier`."""
    return Purifier.bind(**arguments)
