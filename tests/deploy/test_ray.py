"""deploy/ray on a real cluster of this machine's two cores."""

import http.client
import inspect
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from deploy.server import PROJECT
from tests import bundles
from tests.machine import free_port

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[scale]'")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.server

from ray import serve  # noqa: E402

from deploy.dev_server import MAX_BODY  # noqa: E402
from deploy.ray.app import Purifier, build  # noqa: E402

PATH = "/predictions/tiny"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield port
        finally:
            serve.shutdown()
            ray.shutdown()


def run(bundle: Path, replicas: int) -> None:
    arguments = {"bundle": str(bundle), "runtime": "onnxruntime", "allow_seed": True}
    application = build(arguments) if replicas == 1 else Purifier.options(num_replicas=replicas).bind(**arguments)
    serve.run(application, name="tiny", route_prefix=PATH)


def ask(port: int, body: bytes, headers: dict[str, str] | None = None, method: str = "POST") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, PATH, body, headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(bundles.images(1, seed=number)[0]).save(stream, "PNG")
    return stream.getvalue()


def test_a_bad_image_does_not_hurt_its_neighbours(port: int, nvae_bundle: Path) -> None:
    """And an answer depends neither on what it was batched with nor on who gave it."""
    images = [encoded(i) for i in range(8)]
    images[3] = images[3][:60]

    def one(i: int) -> tuple[int, Any]:
        status, answer = ask(port, images[i], {"X-Mlvgm-Seed": str(i)})
        answer.pop("timing_ms", None)
        return status, answer

    rounds = []
    for replicas in (1, 2):
        run(nvae_bundle, replicas)
        with ThreadPoolExecutor(8) as pool:
            rounds.append(list(pool.map(one, range(8))))
    assert [status for status, _ in rounds[0]] == [200, 200, 200, 400, 200, 200, 200, 200]
    assert "truncated" in rounds[0][3][1]["error"]
    assert rounds[0] == rounds[1] == [one(i) for i in range(8)]


def test_what_is_no_request_is_refused(port: int) -> None:
    assert ask(port, b"", method="GET")[0] == 405
    assert ask(port, bytes(MAX_BODY + 1))[0] == 413
    assert ask(port, b'{"image": 1}', {"Content-Type": "application/json"})[0] == 400
    assert ask(port, encoded(1), {"X-Mlvgm-Samples": "1000"})[0] == 400


def test_the_definition_names_what_is_there() -> None:
    from ray.serve.schema import ServeDeploySchema

    content = yaml.safe_load((PROJECT / "deploy" / "ray" / "serve.yaml").read_text())
    schema = ServeDeploySchema(**content)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert [deployment.name for deployment in application.deployments] == [Purifier.name]
    assert len(inspect.signature(build).parameters) == 1, "Ray gives it the arguments of the file, and nothing else"
