"""deploy/ray on a real cluster of this machine's two cores."""

import asyncio
import http.client
import inspect
import io
import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from PIL import Image

from deploy.server import PROJECT
from tests import bundles
from tests.clusters import cluster, ray, serving
from tests.machine import free_port
from tests.stress.nodes import storm

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.server

from ray import serve  # noqa: E402

from deploy.dev_server import MAX_BODY, Batches  # noqa: E402
from deploy.ray.app import Purifier, build  # noqa: E402
from handlers import metrics  # noqa: E402
from handlers.pipeline import Pipeline  # noqa: E402
from handlers.service import Service  # noqa: E402
from handlers.settings import HandlerSettings  # noqa: E402

PATH = "/predictions/tiny"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with cluster(1, 1) as made:
        yield made


@pytest.fixture(scope="module")
def port(nodes: Any, nvae_bundle: Path) -> Iterator[int]:
    """That of two replicas, each on a node of its own."""
    port = free_port()
    arguments = {"bundle": str(nvae_bundle), "runtime": "onnxruntime", "allow_seed": True}
    assert isinstance(build(arguments), serve.Application)
    with serving(Purifier.options(num_replicas=2).bind(**arguments), "tiny", port):
        yield port


def ask(
    port: int, body: bytes, headers: dict[str, str] | None = None, method: str = "POST", path: str = PATH
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(bundles.images(1, seed=number)[0]).save(stream, "PNG")
    return stream.getvalue()


def without_time(status: int, answer: Any) -> tuple[int, Any]:
    answer.pop("timing_ms", None)
    return status, answer


def test_a_bad_image_does_not_hurt_its_neighbours(port: int, nvae_bundle: Path) -> None:
    """And an answer depends neither on what it was batched with nor on who gave it."""
    images = [encoded(i) for i in range(8)]
    images[3] = images[3][:60]

    def one(i: int) -> tuple[int, Any]:
        return without_time(*ask(port, images[i], {"X-Mlvgm-Seed": str(i)}))

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, range(8)))
    assert [status for status, _ in together] == [200, 200, 200, 400, 200, 200, 200, 200]
    assert "truncated" in together[3][1]["error"]
    assert together == [one(i) for i in range(8)]
    with Pipeline.load(nvae_bundle, "onnxruntime") as pipeline:
        service = Service(pipeline, HandlerSettings(allow_seed=True))
        for i, (status, answer) in enumerate(together):
            (here,) = service.answer([({"body": images[i]}, {"X-Mlvgm-Seed": str(i)})])
            assert without_time(here.status, json.loads(here.body)) == (status, answer)


def test_what_is_no_request_is_refused(port: int) -> None:
    assert ask(port, b"", method="GET")[0] == 405
    assert ask(port, bytes(MAX_BODY + 1))[0] == 413
    assert ask(port, b'{"image": 1}', {"Content-Type": "application/json"})[0] == 400
    assert ask(port, encoded(1), {"X-Mlvgm-Samples": "1000"})[0] == 400


def test_the_paths_of_the_open_inference_protocol(port: int) -> None:
    assert ask(port, b"", method="GET", path="/v2/health/ready") == (200, {"ready": True})
    assert ask(port, b"", method="GET", path="/v2/models/tiny/ready") == (200, {"name": "tiny", "ready": True})
    assert ask(port, b"", method="GET", path="/v2/models/tiny")[1]["inputs"][0]["name"] == "images"
    assert ask(port, b"", method="GET", path="/v2/models/other")[0] == 404
    pixels = bundles.images(2)
    tensor = {"name": "images", "datatype": "UINT8", "shape": pixels.shape, "data": pixels.tolist()}
    status, answer = ask(port, json.dumps({"inputs": [tensor]}).encode(), path="/v2/models/tiny/infer")
    assert (status, answer["outputs"][0]["shape"]) == (200, [2])


def test_its_metrics_have_the_names_of_the_others(port: int) -> None:
    rare = (metrics.FALLBACKS, metrics.SUSPICIOUS, metrics.FLAGGED, metrics.DISAGREED)
    wanted = {f"\nray_{measure.name}" for measure in set(metrics.MEASURES) - set(rare)}
    wanted |= {"\nray_mlvgm_rejected_total{", 'reason="image"', 'ModelName="tiny"'}
    assert (ask(port, encoded(1))[0], ask(port, encoded(1)[:60])[0]) == (200, 400)
    for _ in range(120):
        text = ""
        for node in ray.nodes():
            with urllib.request.urlopen(
                f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10
            ) as response:
                text += response.read().decode()
        missing = {part for part in wanted if part not in text}
        if not missing:
            break
        time.sleep(0.5)
    assert not missing


def test_a_replica_is_healthy_as_long_as_it_answers() -> None:
    """Ray replaces one whose check raises or takes too long."""
    replica = object.__new__(Purifier.func_or_class)  # without Ray around it
    answers = [None, RuntimeError("self-test failed: a stage is broken")]
    replica._service, replica._batches = Mock(probe=Mock(side_effect=answers)), Batches(lambda _: [], 1, 0)
    asyncio.run(replica.check_health())
    assert replica._is_ready()
    with pytest.raises(RuntimeError, match="a stage is broken"):
        asyncio.run(replica.check_health())
    replica._checked -= 60
    assert not replica._is_ready()


def test_the_definition_names_what_is_there() -> None:
    from ray.serve.schema import ServeDeploySchema

    content = yaml.safe_load((PROJECT / "deploy" / "ray" / "serve.yaml").read_text())
    schema = ServeDeploySchema(**content)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert [deployment.name for deployment in application.deployments] == [Purifier.name]
    assert len(inspect.signature(build).parameters) == 1, "Ray gives it the arguments of the file, and nothing else"


def test_a_node_that_dies_within_requests(port: int, nodes: Any, nvae_bundle: Path) -> None:
    """Last of this file: each request gets an answer or an error, and the answers are right."""
    images = [encoded(i) for i in range(90)]
    said = storm(nvae_bundle, f"http://127.0.0.1:{port}{PATH}", images, nodes, kill_after=30)
    assert (sum(said["statuses"].values()), said["wrong"]) == (90, 0)
    assert set(said["statuses"]) <= {200, 500, 503}
    assert said["statuses"][200] > 60
