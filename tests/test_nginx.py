"""nginx in front of TorchServe, as deploy/nginx.conf has it: what passes, what does not, and that a stop drains."""

import http.client
import io
import json
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cli.server import Server
from export.archive import Settings, build_archive
from tests import bundles
from tests.cli.machine import free_port

pytestmark = pytest.mark.server
pytest.importorskip("ts", reason="needs TorchServe")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
if NGINX is None or shutil.which("openssl") is None:
    pytest.skip("needs nginx and openssl (Debian: apt install nginx-light openssl)", allow_module_level=True)

CONF = Path(__file__).resolve().parent.parent / "deploy" / "nginx.conf"
KEY = {"X-Api-Key": "open-sesame"}


@dataclass
class Pair:
    """TorchServe, and nginx in front of it."""

    server: Server
    port: int
    process: "subprocess.Popen[bytes]"

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=trusting())
        try:
            connection.request(method, path, body, KEY if headers is None else headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def raw(self, request: bytes) -> bytes:
        with trusting().wrap_socket(socket.create_connection(("127.0.0.1", self.port), timeout=30)) as stream:
            stream.sendall(request)
            answer = b""
            while part := stream.recv(65536):
                answer += part
        return answer


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def picture() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(bundles.images(1)[0]).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def pair(nvae_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    build_archive(nvae_bundle, folder, Settings(runtime="onnxruntime", threads=1, batch_size=8, batch_delay_ms=800))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLVGM_STATE", str(tmp_path_factory.mktemp("s")))
        server = Server(port=free_port())
        server.start([folder / "tiny.mar"])
        process = None
        try:
            port = free_port()
            process = start_nginx(folder, port, server)
            yield Pair(server, port, process)
        finally:
            if process and process.poll() is None:
                process.terminate()
                process.wait(30)
            server.stop()


def start_nginx(folder: Path, port: int, server: Server) -> "subprocess.Popen[bytes]":
    text = CONF.read_text()
    for ours, here in (
        ("/etc/mlvgm", str(folder)),
        ("/run/mlvgm-nginx.pid", str(folder / "nginx.pid")),
        ("listen 8443", f"listen 127.0.0.1:{port}"),
        ("127.0.0.1:8080", f"127.0.0.1:{server.port}"),
    ):
        assert ours in text
        text = text.replace(ours, here)
    (folder / "nginx.conf").write_text(text)
    (folder / "clients.map").write_text('"open-sesame" tester;\n')
    (folder / "upstream.conf").write_text(f'set $inference_key "{server.client().key("inference")}";\n')
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    words += ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    assert NGINX is not None
    command = [NGINX, "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.1)
    raise AssertionError("nginx does not listen")


def test_predictions_pass(pair: Pair) -> None:
    status, answer = pair.ask("POST", "/predictions/tiny", picture())
    assert status == 200
    assert answer["label"] in bundles.CLASSES
    assert pair.ask("PUT", "/predictions/tiny", picture(), KEY | {"X-Mlvgm-Samples": "2"})[1]["samples"] == 2


@pytest.mark.parametrize("headers", [{}, {"X-Api-Key": "guessed"}, {"Authorization": "Bearer guessed"}])
def test_without_a_known_key_nothing_passes(pair: Pair, headers: dict[str, str]) -> None:
    assert pair.ask("POST", "/predictions/tiny", picture(), headers)[0] == 401


def test_torchserves_own_key_is_no_clients_key(pair: Pair) -> None:
    key = pair.server.client().key("inference")
    assert pair.ask("POST", "/predictions/tiny", picture(), {"Authorization": f"Bearer {key}"})[0] == 401


@pytest.mark.parametrize(
    "path", ["/", "/ping", "/models", "/models/tiny", "/metrics", "/token?type=inference", "/predictions/tiny/1.0",
             "/predictions/../models", "/predictions/%2e%2e/models", "/v2/models/tiny/infer", "/explanations/tiny"],
)  # fmt: skip
def test_other_paths_are_not_there(pair: Pair, path: str) -> None:
    assert pair.ask("POST", path)[0] == 404


def test_other_methods_are_refused(pair: Pair) -> None:
    assert pair.ask("GET", "/predictions/tiny")[0] == 405
    assert pair.ask("DELETE", "/predictions/tiny")[0] == 405


def test_a_large_body_never_reaches_torchserve(pair: Pair) -> None:
    head = b"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\nX-Api-Key: open-sesame\r\nContent-Length: 6553501\r\n"
    assert pair.raw(head + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "framing",
    [
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Content-Length: 5\r\nContent-Length: 40\r\n",
    ],
)
def test_requests_with_doubtful_framing_are_refused(pair: Pair, framing: bytes) -> None:
    second = b"GET /models HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\nX-Api-Key: open-sesame\r\nConnection: close\r\n" + framing
    answer = pair.raw(head + b"\r\n0\r\n\r\n" + second)
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501"))
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_refused_image_keeps_its_reason(pair: Pair) -> None:
    status, answer = pair.ask("POST", "/predictions/tiny", b"no image")
    assert status == 400
    assert "not a JPEG" in answer["error"]


def test_a_stop_drains_what_is_in_flight(pair: Pair) -> None:
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(pair.ask, "POST", "/predictions/tiny", picture()) for _ in range(6)]
        time.sleep(0.5)  # TorchServe waits 800 ms for a batch to fill: these are on their way
        pair.process.send_signal(signal.SIGQUIT)
        answers = [future.result(60) for future in asked]
    assert [status for status, _ in answers] == [200] * 6
    pair.process.wait(60)
    with pytest.raises(ConnectionRefusedError):
        pair.ask("POST", "/predictions/tiny", picture())
