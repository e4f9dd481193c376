"""nginx in front of TorchServe, as deploy/nginx.conf has it: what passes, what does not, and how fast it says so."""

import base64
import contextlib
import json
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import readiness
from deploy.nginx import fair_share, most_requests, several_clients
from tests import bundles
from tests.deploy.pair import KEY, LONG_KEY, WAIT, Pair, needs_both, picture, tiny_store, until
from tests.handlers import forms

pytestmark = pytest.mark.server
needs_both()


@pytest.fixture(scope="module")
def pair(nvae_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("p"), metrics=True)
    pair.start(tiny_store(nvae_bundle, tmp_path_factory.mktemp("store")))
    try:
        yield pair
    finally:
        pair.stop()


def test_predictions_pass(pair: Pair) -> None:
    status, answer = pair.ask("POST", "/predictions/tiny", picture())
    assert status == 200
    assert answer["label"] in bundles.CLASSES
    assert pair.ask("PUT", "/predictions/tiny", picture(), KEY | {"X-Mlvgm-Samples": "2"})[1]["samples"] == 2
    assert pair.ask("POST", "/v2/models/tiny/infer", picture())[1]["samples"] == 5


@pytest.mark.parametrize("headers", [{}, {"X-Api-Key": "guessed"}, {"Authorization": "Bearer guessed"}])
def test_without_a_known_key_nothing_passes(pair: Pair, headers: dict[str, str]) -> None:
    assert pair.ask("POST", "/predictions/tiny", picture(), headers)[0] == 401


def test_a_key_may_be_long(pair: Pair) -> None:
    assert pair.predict(LONG_KEY)[0] == 200


def test_torchserves_own_key_is_no_clients_key(pair: Pair) -> None:
    key = pair.server.client().key("inference")
    assert pair.ask("POST", "/predictions/tiny", picture(), {"Authorization": f"Bearer {key}"})[0] == 401


@pytest.mark.parametrize(
    "path", ["/", "/ping", "/models", "/models/tiny", "/metrics", "/token?type=inference", "/predictions/tiny/1.0",
             "/predictions/../models", "/predictions/%2e%2e/models", "/v2/models/tiny/stats", "/v2/repository/index",
             "/explanations/tiny", "/error", "/malformed", "/plain"],
)  # fmt: skip
def test_other_paths_are_not_there(pair: Pair, path: str) -> None:
    assert pair.ask("POST", path)[0] == 404


@pytest.mark.parametrize(
    "line", [b"POST /predictions/..%2f..%2fetc HTTP/1.1", b"POST  HTTP/1.1", b"nonsense", b"\x16\x03\x01"]
)
def test_malformed_requests_are_told_so(pair: Pair, line: bytes) -> None:
    head, _, body = pair.raw(line + b"\r\nHost: x\r\nConnection: close\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body) == {"error": "malformed request"}


def test_readiness_needs_no_key_and_is_said_of_models_that_answer(pair: Pair) -> None:
    assert pair.ask("GET", "/v2/health/ready", headers={}) == (200, {"ready": True})
    assert pair.ask("GET", "/v2/health/live", headers={}) == (200, {"live": True})
    assert pair.ask("GET", "/v2/models/tiny/ready", headers={}) == (200, {"name": "tiny", "ready": True})
    assert pair.ask("GET", "/v2/models/tiny/versions/1.0/ready", headers={})[0] == 200
    assert pair.ask("GET", "/v2/models/tiny/versions/2.0/ready", headers={})[0] == 503
    assert pair.ask("GET", "/v2/models/other/ready", headers={}) == (503, {"name": "other", "ready": False})
    assert pair.ask("GET", "/v2/models/../ready", headers={})[0] == 404


def test_models_are_described_to_clients_with_a_key(pair: Pair) -> None:
    assert pair.ask("GET", "/v2")[1]["extensions"] == ["binary_tensor_data"]
    status, model = pair.ask("GET", "/v2/models/tiny")
    assert (status, model["name"], model["versions"]) == (200, "tiny", ["1.0"])
    assert pair.ask("GET", "/v2/models/tiny/versions/1.0") == (status, model)
    answer = pair.ask("POST", "/v2/models/tiny/versions/1.0/infer", infer_request())[1]
    names = [(tensor["name"], tensor["datatype"], len(tensor["shape"])) for tensor in answer["outputs"]]
    assert names == [(tensor["name"], tensor["datatype"], len(tensor["shape"])) for tensor in model["outputs"]]
    assert pair.ask("GET", "/v2/models/other")[0] == 404
    assert pair.ask("GET", "/v2/models/tiny/versions/2.0")[0] == 404
    assert pair.ask("POST", "/v2/models/tiny/versions/2.0/infer", infer_request())[0] == 404
    for path in ("/v2", "/v2/models/tiny"):
        assert pair.ask("GET", path, headers={})[0] == 401


def infer_request() -> bytes:
    image = base64.b64encode(picture()).decode()
    return json.dumps({"inputs": [{"name": "i", "shape": [1], "datatype": "BYTES", "data": [image]}]}).encode()


@pytest.mark.parametrize(
    "path", ["/ping/../predictions/tiny", "/models/%2e%2e/predictions/tiny", "//predictions//tiny"]
)
def test_the_path_that_matched_is_the_one_that_is_asked_for(pair: Pair, path: str) -> None:
    status, answer = pair.ask("POST", path, picture())
    assert (status, answer["label"] in bundles.CLASSES) == (200, True)
    until(lambda: pair.requests()[-1]["request"] == "POST /predictions/tiny")


def test_every_refusal_is_json(pair: Pair) -> None:
    """Also what nginx has pages of its own for."""
    key = b"Host: x\r\nX-Api-Key: open-sesame\r\nConnection: close\r\n"
    refused = [
        (b"TRACE / HTTP/1.1\r\n" + key, 405),
        (b"CONNECT x:1 HTTP/1.1\r\n" + key, 400),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n" + key, 414),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n" + key, 400),
        (b"POST /predictions/tiny HTTP/1.1\r\nTransfer-Encoding: gzip\r\n" + key, 501),
        (b"POST /elsewhere HTTP/1.1\r\nContent-Length: 99999999\r\n" + key, 413),
        (b"POST /predictions/tiny HTTP/1.1\r\nContent-Length: -1\r\n" + key, 400),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n", 400),
        (b"GET / HTTP/3.0\r\n" + key, 505),
        (b"PUT /v2/health/ready HTTP/1.1\r\nContent-Length: 0\r\n" + key, 405),
    ]
    for request, status in refused:
        head, _, body = pair.raw(request + b"\r\n").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d" % status), (request[:60], head)
        assert json.loads(body)["error"], request[:60]
    with socket.create_connection(("127.0.0.1", pair.port), timeout=30) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := plain.recv(65536):
            answer += part
    assert "https" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_probes_are_no_traffic_and_clients_cannot_pass_as_one(pair: Pair) -> None:
    def answered() -> float:
        text = urllib.request.urlopen(f"http://127.0.0.1:{pair.metrics_port}/metrics", timeout=30).read().decode()
        return sum(map(float, re.findall(r"^mlvgm_answers\{.*\} (\S+)$", text, re.MULTILINE)))

    before = answered()
    for _ in range(3):
        readiness.ask(pair.server, "tiny", 60)
    assert pair.predict(KEY | {"X-Readiness-Probe": "1"})[0] == 200
    until(lambda: answered() == before + 1)


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


def test_an_image_as_curl_sends_it_by_default_is_an_image(pair: Pair) -> None:
    """``curl --data-binary @sign.png`` says that it is a web form."""
    headers = KEY | {"Content-Type": "application/x-www-form-urlencoded"}
    assert pair.ask("POST", "/predictions/tiny", picture(), headers)[0] == 200
    assert pair.ask("POST", "/predictions/tiny", b"image=hello", headers)[0] == 400


def test_forms_are_read_by_the_handler(pair: Pair) -> None:
    """TorchServe's own reader answers the last two with 500, and keeps only the last of several images."""
    headers = KEY | {"Content-Type": forms.TYPE}

    def ask(body: bytes) -> tuple[int, dict[str, Any]]:
        return pair.ask("POST", "/predictions/tiny", body, headers)

    assert ask(forms.written(("image", picture()), ("samples", b"2")))[1]["samples"] == 2
    status, answer = ask(forms.written(("image", picture()), ("image", b"no image"), ("image", picture())))
    assert [status, *("label" in each for each in answer["answers"])] == [200, True, False, True]
    assert ask(b"--x\r\n\r\n--x--\r\n") == (400, {"error": "the form is malformed, or broken off", "status": 400})
    assert ask(b"--x")[0] == 400


def test_what_a_client_calls_a_form_by_our_own_header_is_none(pair: Pair) -> None:
    headers = KEY | {"X-Form-Type": forms.TYPE}
    assert pair.ask("POST", "/predictions/tiny", picture(), headers)[0] == 200


def test_a_refused_image_keeps_its_reason(pair: Pair) -> None:
    status, answer = pair.ask("POST", "/predictions/tiny", b"no image")
    assert status == 400
    assert "not a JPEG" in answer["error"]


def test_a_model_that_is_not_served_is_named_as_such(pair: Pair) -> None:
    status, answer = pair.ask("POST", "/predictions/other", picture())
    assert (status, answer) == (404, {"error": "no such model is served here"})


def test_more_connections_than_a_client_may_have_are_refused_at_once(pair: Pair) -> None:
    """Uploads that take their time: the next request is told so, and is served when they have gone.

    Another client is served meanwhile.
    """
    most = most_requests(pair.server)
    with contextlib.ExitStack() as stack:
        for _ in range(most):
            stack.enter_context(pair.connect()).sendall(half_a_request("open-sesame"))
        until(lambda: pair.predict()[0] == 429)
        assert f"{most} at once" in pair.predict()[1]["error"]
        assert pair.predict(LONG_KEY)[0] == 200
    until(lambda: pair.predict()[0] == 200)


@pytest.fixture
def shared(nvae_bundle: Path, tmp_path: Path) -> Iterator[Pair]:
    """With two workers, and three clients: tester, other, and gateway-web."""
    pair = Pair(tmp_path / "p")
    with pair.clients.open("a") as clients:
        clients.write('"web" gateway-web;\n')
    pair.start(tiny_store(nvae_bundle, tmp_path / "store", batch_delay_ms=1), "--workers", "2")
    try:
        yield pair
    finally:
        pair.stop()


def test_clients_that_share_the_workers_leave_one_free(shared: Pair) -> None:
    """A client with costly requests at work gets small ones answered; all others get what they ask for, and a gateway
    does whatever it holds.
    """
    assert fair_share(shared.server) == 1
    costly = {"X-Mlvgm-Samples": "2"}
    with contextlib.ExitStack() as stack:
        for key in ("open-sesame", "web"):
            stack.enter_context(shared.connect()).sendall(half_a_request(key, costly))
        until(lambda: shared.predict(KEY | costly)[0] == 429)
        assert "1 at once" in shared.predict(KEY | costly)[1]["error"]
        assert shared.predict()[0] == 200
        assert shared.ask("GET", "/v2/health/ready")[0] == 200
        assert shared.predict(LONG_KEY | costly)[0] == 200
        assert shared.predict({"X-Api-Key": "web"} | costly)[0] == 200
    until(lambda: shared.predict(KEY | costly)[0] == 200)


def test_a_client_that_shares_may_send_twice_as_many_small_requests(shared: Pair) -> None:
    most = 2 * fair_share(shared.server)
    with contextlib.ExitStack() as stack:
        for _ in range(most):
            stack.enter_context(shared.connect()).sendall(half_a_request("open-sesame"))
        until(lambda: shared.predict()[0] == 429)
        assert f"{most} at once" in shared.predict()[1]["error"]
        assert shared.predict(LONG_KEY)[0] == 200
    until(lambda: shared.predict()[0] == 200)


def test_a_client_that_is_alone_has_all_workers(shared: Pair) -> None:
    shared.clients.write_text('# the others have left\n"open-sesame" tester;\n"another-key" tester;\n')
    until(lambda: shared.predict(LONG_KEY)[0] == 401)  # nginx has read the file
    costly = {"X-Mlvgm-Samples": "2"}
    with shared.connect() as first, shared.connect() as second:
        first.sendall(half_a_request("open-sesame", costly))
        second.sendall(half_a_request("open-sesame", costly))
        assert [shared.predict(KEY | costly)[0] for _ in range(3)] == [200] * 3


def test_clients_are_counted_by_their_names(tmp_path: Path) -> None:
    clients = tmp_path / "clients.map"
    assert several_clients(clients), "as long as it is not there"
    for several, content in (
        (False, '"key" one;\n'),
        (False, '# keys\n\n"key" one;\n  "next key" one;\n'),
        (True, '"key" one;\n"next key" two;\n'),
    ):
        clients.write_text(content)
        assert several_clients(clients) == several
    clients.write_bytes(b'"\xff" one;\n"key" two;')
    assert several_clients(clients)


def half_a_request(key: str, headers: dict[str, str] | None = None) -> bytes:
    """It holds a place until nginx has waited for its end for too long."""
    lines = {"Host": "x", "X-Api-Key": key, "Content-Length": "1000", **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST /predictions/tiny HTTP/1.1\r\n{head}\r\nhalf".encode()


def test_slow_clients_are_cut_off_and_keep_nobody_waiting(pair: Pair) -> None:
    """Half a header and half a body: nginx ends both in the end, and meanwhile everybody else is served."""
    head = b"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\n"
    halves = [head, head + b"X-Api-Key: open-sesame\r\nContent-Length: 1000\r\n\r\nhalf"]
    streams = [pair.connect() for _ in range(40)]
    for i, stream in enumerate(streams):
        stream.sendall(halves[i % 20 == 0])
    assert pair.predict()[0] == 200
    for stream in streams:
        stream.settimeout(WAIT)
        with stream, contextlib.suppress(ConnectionError, ssl.SSLError):
            while stream.recv(65536):
                pass


def test_the_log_names_clients_and_holds_no_key(pair: Pair) -> None:
    pair.predict()
    pair.predict({"X-Api-Key": "guessed"})
    until(lambda: {200, 401} <= {line["status"] for line in pair.requests()})  # written after the answers
    last = {line["status"]: line for line in pair.requests()}  # slow clients of other tests may end at any time
    assert (last[200]["client"], last[200]["request"]) == ("tester", "POST /predictions/tiny")
    assert min(last[200]["seconds"], float(last[200]["torchserve_seconds"])) > 0
    assert last[401]["client"] == ""
    assert "open-sesame" not in pair.log()


def test_metrics_are_on_a_port_of_their_own_and_nothing_else_is(pair: Pair) -> None:
    pair.predict()
    address = f"http://127.0.0.1:{pair.metrics_port}"
    text = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
    assert "ts_inference_requests_total" in text
    assert "mlvgm_queue_seconds_count" in text, "nginx says when a request came"
    for path in ("/", "/models", "/predictions/tiny", "/metrics/../models"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + path, timeout=30)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(f"{address}/metrics", b"x"), timeout=30)
