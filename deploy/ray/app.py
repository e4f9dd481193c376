"""The purifier on Ray Serve: the requests and the answers of TorchServe, on as many machines as a cluster has.

    pip install -e '.[cpu,scale]'
    serve run deploy/ray/serve.yaml

Ray's HTTP proxy takes requests from anybody: put nginx in front of it, as in front of TorchServe (deploy/nginx.conf).
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
    """One pipeline and its engines; Ray runs as many of these as the load needs.

    Args:
        bundle: folder of the bundle, on every machine the same.
        runtime: see `Pipeline.load`.
        threads: CPU threads; give the deployment as many ``num_cpus``.
        allow_seed: let clients choose the noise.
        batch: images that are answered together at most.
    """

    def __init__(self, bundle: str, runtime: str = "auto", threads: int = 1, allow_seed: bool = False, batch: int = 8):
        self._service = Service(Pipeline.load(bundle, runtime, threads), allow_seed)
        self._service.self_test()
        self._together.set_max_batch_size(batch)

    async def __call__(self, request: Request) -> Response:
        """What is wrong with a request becomes its own answer: nothing is raised, so no neighbour can be hit."""
        return await predict(request, self._together)

    @serve.batch(batch_wait_timeout_s=0.002)
    async def _together(self, requests: list[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[answer.Response]:
        return await asyncio.to_thread(self._service.answer, requests)


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application of serve.yaml; ``arguments`` are those of `Purifier`."""
    return Purifier.bind(**arguments)
