"""Whether models answer, with a server that does as it is told."""

import contextlib
import http.client
import http.server
import threading
import urllib.parse
from pathlib import Path

import pytest

from deploy import readiness
from deploy.health import Health
from deploy.model_archive import ServedModel
from deploy.readiness import HANGS_S, LOOK_EVERY_S, PREDICT_EVERY_S, ProbeResult, Readiness
from deploy.server import Server
from handlers.reply import ServerError

TIMEOUT = 30.0


class FakeServer(Server):
    """Two models, of which one may not answer; workers that compute for so many seconds a look."""

    def __init__(self) -> None:
        super().__init__(1, "/nowhere")
        self.statuses = {"a": 200, "b": 200}
        self.workers = True
        self.computed: float | None = 0.0
        self.asked: list[str] = []

    def served(self) -> dict[str, ServedModel]:
        return {name: ServedModel(name, "1.0", metadata={"name": name}) for name in self.statuses}

    def worker_seconds(self) -> float | None:
        return self.computed


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()

    def ask(_: Server, model: str, _timeout: float) -> None:
        server.asked.append(model)
        if server.statuses[model] != 200:
            raise ServerError("refused", server.statuses[model])

    monkeypatch.setattr(readiness, "ask", ask)
    monkeypatch.setattr(readiness, "_has_worker", lambda *_: server.workers)
    return server


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def looked(server: FakeServer, clock: Clock) -> Readiness:
    found = Readiness(server, TIMEOUT, clock)
    found.look()
    return found


@pytest.mark.parametrize(("status", "answers"), [(200, True), (422, True), (400, False), (500, False), (503, False)])
def test_a_probe_is_answered_also_where_its_image_is_refused_as_suspicious(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, answers: bool
) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as asked:
        server = Server(asked.server_port, tmp_path)
        server.folder.mkdir()
        server.key_file.write_text('{"inference": {"key": "k"}}')
        threading.Thread(target=asked.handle_request, daemon=True).start()
        with contextlib.nullcontext() if answers else pytest.raises(ServerError, match=str(status)):
            readiness.ask(server, "m", TIMEOUT)


def test_ready_is_what_answers(looked: Readiness, server: FakeServer, clock: Clock) -> None:
    assert looked.models() == {"a": True, "b": True}
    assert looked.ready()
    server.statuses["b"] = 500
    clock.now += PREDICT_EVERY_S
    looked.look()
    assert looked.models() == {"a": True, "b": False}
    assert not looked.ready()


def test_predictions_are_asked_for_seldom_and_workers_are_looked_for_often(
    looked: Readiness, server: FakeServer, clock: Clock
) -> None:
    clock.now += LOOK_EVERY_S
    looked.look()
    assert server.asked == ["a", "b"]
    server.workers = False
    looked.look()
    assert not looked.ready()
    server.workers = True
    looked.look()
    assert looked.ready()
    assert server.asked == ["a", "b", "a", "b"]


def test_what_is_not_confirmed_expires(looked: Readiness, server: FakeServer, clock: Clock) -> None:
    """As when the thread that looks is stuck, with workers that compute."""
    for _ in range(5):
        clock.now += HANGS_S - 1
        assert server.computed is not None
        server.computed += 1
        assert looked.ready() is (clock.now < 1000 + PREDICT_EVERY_S + TIMEOUT)


def test_hung_is_what_neither_answers_nor_computes(looked: Readiness, server: FakeServer, clock: Clock) -> None:
    server.statuses = {"a": 0, "b": 0}
    looked.hung_for()
    clock.now += HANGS_S + 1
    assert looked.hung_for() == HANGS_S + 1
    assert not looked.ready(), "at once, not only when the probe has run out of time"
    server.computed = 1.0  # busy, then
    assert looked.hung_for() == 0
    assert looked.ready()
    server.statuses = {"a": 500, "b": 500}
    server.computed = None
    clock.now += HANGS_S + 1
    assert looked.hung_for() == 0, "in another container nobody can tell"


def test_an_error_is_an_answer_and_no_hang(looked: Readiness, server: FakeServer, clock: Clock) -> None:
    server.statuses = {"a": 500, "b": 400}
    clock.now += 1000
    looked.look()
    assert looked.hung_for() == 0
    assert not looked.ready()


def test_another_server_has_answered_when_it_is_followed(looked: Readiness) -> None:
    other = FakeServer()
    other.statuses = {"c": 200}
    looked.follow(other)
    assert looked.models() == {"c": True}
    looked.stop()
    assert not looked.ready()


@pytest.mark.parametrize("error", [ServerError("no server there"), OSError("its files are being removed")])
def test_what_a_former_server_was_found_to_be_is_not_said_of_the_present_one(
    looked: Readiness, clock: Clock, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """As when a probe is under way while nginx is switched, and the former server is then stopped."""

    def ask(*_: object) -> None:
        looked.follow(FakeServer())
        raise error

    monkeypatch.setattr(readiness, "ask", ask)
    clock.now += PREDICT_EVERY_S
    looked.look()
    assert looked.models() == {"a": True, "b": True}


def test_no_model_is_ready_again_once_it_is_stopped(
    looked: Readiness, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "ask", lambda *_: looked.stop())
    clock.now += PREDICT_EVERY_S
    looked.look()
    assert not looked.ready()


def test_a_full_queue_is_ready_only_where_workers_compute(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.statuses["a"] = 503
    assert readiness.check(server, "a", 0.5) == ProbeResult(False, "not ready: refused", True)
    times = iter([1.0, 1.0, 1.2])
    monkeypatch.setattr(server, "worker_seconds", lambda: next(times))
    assert readiness.check(server, "a", 60) == ProbeResult(True, "ready, and busy: its queue is full")


class SocketConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        import socket

        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(urllib.parse.unquote(self.host))


def test_the_endpoint_of_nginx(looked: Readiness, server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "health.sock"
    path.touch()  # of a process that was killed
    health = Health(path, looked, lambda: server)
    health.start()

    def ask(target: str) -> tuple[int, str]:
        connection = SocketConnection(str(path))
        connection.request("GET", target)
        response = connection.getresponse()
        with contextlib.closing(connection):
            return response.status, response.read().decode()

    assert ask("/v2/health/ready") == (200, '{"ready": true}')
    assert ask("/v2/health/live") == (200, '{"live": true}')
    assert ask("/v2/models/a/versions/1.0/ready") == (200, '{"name": "a", "ready": true}')
    assert ask("/v2/models/a/versions/2.0/ready")[0] == 503
    assert ask("/v2/models/c/ready") == (503, '{"name": "c", "ready": false}')
    assert ask("/v2/models/a") == (200, '{"name": "a"}')
    assert ask("/v2/models/a/versions/2.0")[0] == ask("/elsewhere")[0] == 404
    looked.stop()
    assert ask("/v2/health/ready") == (503, '{"ready": false}')
    health.stop()
    assert not path.exists()
