"""The purifier on Ray Serve, on all machines of a cluster, with the same requests and answers as TorchServe.

    pip install -e '.[cpu,scale]'
    serve run deploy/ray/serve.yaml

Ray's HTTP proxy has no authentication: run it behind nginx, like TorchServe (deploy/nginx.conf).
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from deploy.dev_server import predict
from handlers import answer
from handlers.pipeline import Pipeline
from handlers.service import Service


@serve.deployment
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
        self._service = Service(Pipeline.load(bundle, runtime, threads), allow_seed)
        self._service.self_test()
        self._answer_batch.set_max_batch_size(batch)

    async def __call__(self, request: Request) -> Response:
        """Answer a request. Errors become its response; nothing is raised, which would fail the whole batch."""
        return await predict(request, self._answer_batch)

    @serve.batch(batch_wait_timeout_s=0.002)
    async def _answer_batch(self, requests: list[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[answer.Response]:
        return await asyncio.to_thread(self._service.answer, requests)


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application of serve.yaml; ``arguments`` are those of `Purifier`."""
    return Purifier.bind(**arguments)
