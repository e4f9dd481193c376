"""The requests and answers of TorchServe behind nginx, from one process without Java, archive or keys: to develop with.

`routes` is all of it that is not this process: deploy/ray answers with it too.
"""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from deploy import api
from deploy.errors import CliError
from deploy.health import protocol_answer
from deploy.model_archive import ServedModel
from handlers import answer, arrival, form, open_inference
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline
from handlers.request import MAX_BODY
from handlers.service import Service
from handlers.settings import HandlerSettings

_BODY_SECONDS = 10.0
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
_QUEUE = 100  # requests; the next one gets 503 at once

Fields = tuple[Mapping[str, Any], Mapping[str, Any]]
"""A request as `handlers.service.Service.answer` takes it."""


def application(manifest: Manifest, service: Service, batch: int = 1, delay_s: float = 0.0) -> Starlette:
    """The ASGI application that serves ``service``; requests that come within ``delay_s`` are answered together.

    Args:
        batch: requests that are answered together at most.
    """
    return routes(manifest, Batches(service.answer, batch, delay_s), lambda: True)


def routes(manifest: Manifest, batches: "Batches", is_ready: Callable[[], bool]) -> Starlette:
    """The ASGI application that answers requests with ``batches``, and questions about the model of ``manifest``."""
    metadata = open_inference.metadata({"name": manifest.name, "version": manifest.version})
    served = {manifest.name: ServedModel(manifest.name, manifest.version, metadata=metadata)}

    @contextlib.asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(batches.run())
        yield
        task.cancel()

    async def ask(request: Request) -> Response:
        wanted = request.path_params
        if wanted["model"] != manifest.name or wanted.get("version", manifest.version) != manifest.version:
            return _refusal(404, "no such model is served here")
        if request.method not in ("POST", "PUT"):
            return _refusal(405, "send the image with POST or PUT")
        try:
            body = await asyncio.wait_for(_body(request), _BODY_SECONDS)
        except (asyncio.TimeoutError, ClientDisconnect):
            return _refusal(408, "the body did not come in time")
        if body is None:
            return _refusal(413, "the body is larger than 6.5 MB")
        made = await batches.ask(({"body": body}, _headers(request)))
        return Response(made.body, made.status, made.headers, made.content_type)

    async def describe(request: Request) -> Response:
        status, content = protocol_answer(request.url.path, served, {manifest.name: is_ready()})
        return JSONResponse(content, status)

    async def elsewhere(_: Request, __: Exception) -> Response:
        return _refusal(404, "only /predictions/MODEL and /v2/models/MODEL/infer are here")

    paths = ["/predictions/{model}", "/predictions/{model}/{version}"]
    paths += ["/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"]
    found = [Route(path, ask, methods=["GET", "POST", "PUT", "DELETE", "PATCH"]) for path in paths]
    found += [Route("/v2", describe), Route("/v2/{rest:path}", describe)]
    page = HTMLResponse(api.page(manifest.name), headers={"Content-Security-Policy": _POLICY})
    found += [Route("/", lambda _: page), Route("/openapi.json", lambda _: JSONResponse(api.document()))]
    found += [Route("/ping", lambda _: JSONResponse({"status": "Healthy"}))]
    return Starlette(routes=found, lifespan=running, exception_handlers={404: elsewhere})


class Batches:
    """Requests that wait, and the thread that answers them a batch after the other."""

    def __init__(self, run: Callable[[Sequence[Fields]], Sequence[answer.Response]], size: int, delay_s: float) -> None:
        self._run, self._size, self._delay_s = run, size, delay_s
        self._queue: asyncio.Queue[tuple[Fields, asyncio.Future[answer.Response]]] = asyncio.Queue(_QUEUE)
        self._thread = ThreadPoolExecutor(1, "pipeline")

    async def ask(self, request: Fields) -> answer.Response:
        """The answer to a request; 503 at once where too many wait."""
        future: asyncio.Future[answer.Response] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((request, future))
        except asyncio.QueueFull:
            return answer.Response(
                503, "application/json", b'{"error": "busy or restarting: try again"}', {"Retry-After": "2"}
            )
        return await future

    async def between(self, call: Callable[[], None]) -> None:
        """Make a call in the thread of the pipeline, when the batch in work is done."""
        await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def run(self) -> None:
        """Answer for ever."""
        while True:
            batch = [await self._queue.get()]
            if self._queue.qsize() < self._size - 1:
                await asyncio.sleep(self._delay_s)
            while len(batch) < self._size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [(request, future) for request, future in batch if not future.done()]  # nobody waits for the others
            requests = [request for request, _ in batch]
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, requests)
            for (_, future), made in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(made)


async def _body(request: Request) -> bytes | None:
    """None where it is too large."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            return None
    return bytes(body)


def _headers(request: Request) -> dict[str, str]:
    """As deploy/nginx.conf hands them on: forms as bytes, and when the request came."""
    headers = {name: value for name, value in request.headers.items() if name != form.HEADER}
    kind = headers.get("content-type", "")
    if kind.lower().startswith("multipart/"):
        headers[form.HEADER] = kind
    if kind.lower().startswith(("multipart/", "application/x-www-form-urlencoded")):
        headers["content-type"] = "application/octet-stream"
    return headers | {arrival.HEADER: f"t={time.time():.3f}"}


def _refusal(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status)


def serve(
    bundle: Path,
    port: int = 8080,
    runtime: str = "auto",
    threads: int = 0,
    batch: int | None = None,
    delay_s: float = 0.002,
    allow_seed: bool = False,
) -> int:
    """Serve ``bundle`` on loopback until SIGINT or SIGTERM; returns 0.

    Raises:
        BundleError, EngineError, RuntimeMissing: as `Pipeline.load`.
        CliError: the port is taken.
    """
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise CliError(f"port {port}: {error.strerror}") from None
    with listener, Pipeline.load(bundle, runtime, threads) as pipeline:
        manifest = pipeline.manifest
        service = Service(pipeline, HandlerSettings(allow_seed=allow_seed))
        service.self_test()
        app = application(manifest, service, batch or manifest.batch.opt, delay_s)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, timeout_keep_alive=30))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/predictions/{manifest.name}"
        print(f"curl -T IMAGE.png {url}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn sends itself the signal again once it has ended in order
            server.run([listener])
    return 0
