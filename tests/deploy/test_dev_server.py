"""The development server: the very answers that TorchServe's handler gives, whatever the request."""

import asyncio
import base64
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the development server: pip install '.[dev-server]'")
pytest.importorskip("uvicorn")

from deploy import dev_server
from deploy.dev_server import MAX_BODY, application
from deploy.errors import CliError
from deploy.server import PROJECT
from handlers.answer import Response as Answer
from handlers.client import Client
from handlers.image import encode_png
from handlers.pipeline import Pipeline
from handlers.service import Service
from handlers.settings import HandlerSettings
from handlers.torchserve import PurifierHandler
from tests import bundles
from tests.machine import free_port

PATH = "/predictions/tiny"
PIXELS = bundles.images(1)[0]
SIGN = encode_png(PIXELS.transpose(2, 0, 1).astype(np.float32) / 255)
TEXT = base64.b64encode(SIGN).decode()
FORM = "multipart/form-data; boundary=x"
V2 = {"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": [TEXT]}], "parameters": {"seed": 3}}


def part(name: str, content: bytes) -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), content)


def as_json(content: object) -> tuple[bytes, dict[str, str]]:
    return json.dumps(content).encode(), {"content-type": "application/json"}


SEED = {"x-mlvgm-seed": "3"}
REQUESTS: dict[str, tuple[bytes, dict[str, str]]] = {
    "image": (SIGN, SEED),
    "image with a type": (SIGN, SEED | {"content-type": "image/png"}),
    "image that curl calls a web form": (SIGN, SEED | {"content-type": "application/x-www-form-urlencoded"}),
    "options": (SIGN, SEED | {"x-mlvgm-samples": "2", "x-mlvgm-top-k": "1", "x-mlvgm-alphas": "none"}),
    "purified": (SIGN, SEED | {"x-mlvgm-return": "purified"}),
    "PNG accepted": (SIGN, SEED | {"accept": "image/png"}),
    "gzip": (gzip.compress(SIGN), SEED | {"content-encoding": "gzip"}),
    "base64": (TEXT.encode(), SEED),
    "JSON": as_json({"image": TEXT, "seed": 3}),
    "JSON list": as_json({"images": [TEXT, "bm8gaW1hZ2U="], "seed": 3}),
    "tensors": as_json(V2),
    "form": (part("image", SIGN) + part("seed", b"3") + b"--x--\r\n", {"content-type": FORM}),
    "form of two": (part("image", SIGN) * 2 + part("seed", b"3") + b"--x--\r\n", {"content-type": FORM}),
    "broken form": (b"--x", {"content-type": FORM}),
    "hidden form": (SIGN, SEED | {"x-form-type": FORM}),
    "nothing": (b"", {}),
    "no image": (b"hello", {}),
    "broken JSON": (b"{", {"content-type": "application/json"}),
    "twice in JSON": (b'{"image": "", "image": ""}', {"content-type": "application/json"}),
    "bad option": (SIGN, {"x-mlvgm-samples": "1000"}),
    "unknown option": (SIGN, {"x-mlvgm-sample": "1"}),
    "claims to be late": (SIGN, SEED | {"x-request-start": "t=1.000"}),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = tmp_path_factory.mktemp("bundle")
    replace(bundles.write_nvae(folder), name="tiny").write(folder)
    with Pipeline.load(folder, runtime="onnxruntime") as pipeline:
        yield pipeline


async def asked(app: Any, body: bytes, headers: dict[str, str], path: str = PATH, method: str = "POST") -> Any:
    """The application's answer to a request."""
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        client.headers.clear()
        return await client.request(method, path, content=body, headers=headers)


class Context:
    """What TorchServe gives a handler beside one request, and takes from it."""

    def __init__(self, headers: dict[str, str]) -> None:
        self.headers, self.answered = headers, {}
        self.status, self.content_type = 0, ""

    def get_all_request_header(self, _: int) -> dict[str, str]:
        return self.headers

    def set_response_status(self, status: int, _phrase: str, _: int) -> None:
        self.status = status

    def set_response_content_type(self, _: int, content_type: str) -> None:
        self.content_type = content_type

    def set_response_header(self, _: int, name: str, value: str) -> None:
        self.answered[name.lower()] = value


def behind_nginx(headers: dict[str, str]) -> dict[str, str]:
    """The headers that deploy/nginx.conf makes of a client's."""
    kind = headers.get("content-type", "")
    named = {name: value for name, value in headers.items() if name not in ("x-form-type", "x-request-start")}
    if kind.startswith("multipart/"):
        named |= {"x-form-type": kind, "content-type": "application/octet-stream"}
    if "urlencoded" in kind:
        named["content-type"] = "application/octet-stream"
    return named | {"x-request-start": f"t={time.time():.3f}"}


def without_times(status: int, content_type: str, body: bytes) -> tuple[int, str, Any]:
    if content_type != "application/json":
        return status, content_type, body
    content = json.loads(body)
    for answer in content.get("answers", [content]):
        answer.pop("timing_ms", None)
    return status, content_type, content


@pytest.mark.parametrize("kind", REQUESTS)
def test_both_layers_say_the_same(kind: str, pipeline: Pipeline) -> None:
    body, headers = REQUESTS[kind]
    service = Service(pipeline, HandlerSettings(allow_seed=True, max_wait_s=30))
    response = asyncio.run(asked(application(pipeline.manifest, service), body, headers))
    handler, context = PurifierHandler(), Context(behind_nginx(headers))
    handler._service = handler._unmeasured = service
    handler._metric_lines = []
    (expected,) = handler.handle([{"body": body}], context)
    here = without_times(response.status_code, response.headers["content-type"], response.content)
    assert here == without_times(context.status, context.content_type, expected)
    assert context.answered.items() <= dict(response.headers).items()
    assert (response.status_code == 200) == (
        kind
        not in ("broken form", "nothing", "no image", "broken JSON", "twice in JSON", "bad option", "unknown option")
    )


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        (f"{PATH}/1.0", "PUT", 200),
        ("/v2/models/tiny/infer", "POST", 200),
        ("/v2/models/tiny/versions/1.0/infer", "POST", 200),
        (f"{PATH}/9.9", "POST", 404),
        ("/predictions/other", "POST", 404),
        ("/elsewhere", "POST", 404),
        (PATH, "GET", 405),
        ("/ping", "GET", 200),
        ("/v2", "GET", 200),
        ("/v2/health/live", "GET", 200),
        ("/v2/health/ready", "GET", 200),
        ("/v2/models/tiny", "GET", 200),
        ("/v2/models/tiny/ready", "GET", 200),
        ("/v2/models/other/ready", "GET", 503),
        ("/v2/models/other", "GET", 404),
    ],
)
def test_paths(path: str, method: str, status: int, pipeline: Pipeline) -> None:
    app = application(pipeline.manifest, Service(pipeline))
    response = asyncio.run(asked(app, b"" if method == "GET" else SIGN, {}, path, method))
    assert response.status_code == status
    assert isinstance(response.json(), dict)


def test_bodies_have_a_limit(pipeline: Pipeline) -> None:
    response = asyncio.run(asked(application(pipeline.manifest, Service(pipeline)), bytes(MAX_BODY + 1), {}))
    assert (response.status_code, response.json()["error"]) == (413, "the body is larger than 6.5 MB")


class Slow:
    """A service whose first batch takes until it is told to end."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go_on = threading.Event()

    def answer(self, requests: Any) -> list[Answer]:
        self.sizes.append(len(requests))
        self.go_on.wait(60)
        return [Answer(200, "application/json", b"{}") for _ in requests]


def test_what_waits_is_answered_together_and_what_has_no_room_is_refused() -> None:
    slow = Slow()
    manifest: Any = SimpleNamespace(name="tiny", version="1.0")

    async def ask_all() -> list[int]:
        app = application(manifest, slow, batch=8)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as to:
            first = asyncio.create_task(to.post(PATH, content=SIGN))
            while not slow.sizes:
                await asyncio.sleep(0.01)
            others = [asyncio.create_task(to.post(PATH, content=SIGN)) for _ in range(104)]
            refused = [await task for task in others[-4:]]
            assert {answer.headers["retry-after"] for answer in refused} == {"2"}
            slow.go_on.set()
            return [answer.status_code for answer in await asyncio.gather(first, *others)]

    statuses = asyncio.run(ask_all())
    assert statuses == [200] * 101 + [503] * 4
    assert slow.sizes[0] == 1
    assert set(slow.sizes[1:-1]) == {8}


def test_a_port_that_is_taken(pipeline: Pipeline, nvae_bundle: Path) -> None:
    port = free_port()
    with dev_server.socket.create_server(("127.0.0.1", port)), pytest.raises(CliError, match="Address already in use"):
        dev_server.serve(nvae_bundle, port)


@pytest.mark.server
def test_it_starts_answers_and_ends(nvae_bundle: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlvgm", "serve", "--dev", str(nvae_bundle), "--port", str(port)]
    process = subprocess.Popen(command, cwd=PROJECT, env=os.environ, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}{PATH}" in process.stdout.readline()
        answer = Client(f"http://127.0.0.1:{port}").predict(SIGN, "tiny", samples=2)
        assert answer["label"] in bundles.CLASSES
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
