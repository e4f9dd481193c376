import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from handlers.client import Client, ServerError


class Keeper(ThreadingHTTPServer):
    """A server with TorchServe's rules for keys: both ports in one, a new key kills the old one."""

    def __init__(self, key_file: Path) -> None:
        super().__init__(("127.0.0.1", 0), Door)
        self.key_file, self.number, self.asked = key_file, 0, []  # type: ignore[var-annotated]
        self.renew("inference")
        self.renew("management")

    def renew(self, kind: str) -> None:
        self.number += 1
        keys = json.loads(self.key_file.read_text()) if self.key_file.exists() else {"API": {"key": "api"}}
        keys[kind] = {"key": f"{kind}-{self.number}", "expiration time": "soon"}
        self.key_file.write_text(json.dumps(keys))
        self.valid = {name: entry["key"] for name, entry in keys.items()}


class Door(BaseHTTPRequestHandler):
    server: Keeper

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, dict(self.headers), body))
        kind = "API" if self.path.startswith("/token") else "management" if "models" in self.path else "inference"
        if self.headers["Authorization"] != f"Bearer {self.server.valid[kind]}":
            return self.say(400, {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed."})
        if kind == "API":
            self.server.renew(self.path.partition("type=")[2])
            return self.say(200, {})
        if body == b"bad":
            return self.say(400, {"error": "truncated"})
        if kind == "management":
            return self.say(200, [{"workers": [{"status": "READY"}, {"status": "UNLOADING"}]}])  # type: ignore[arg-type]
        return self.say(200, {"label": "stop"})

    do_GET = do_PUT = do_POST

    def say(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Mlvgm-Answer", '{"label": "stop"}')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with Keeper(tmp_path / "key_file.json") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def client(keeper: Keeper) -> Client:
    url = f"http://127.0.0.1:{keeper.server_port}"
    return Client(url, management_url=url, key_file=keeper.key_file, timeout=10)


def test_options_travel_as_headers(client: Client, keeper: Keeper) -> None:
    assert client.predict(b"image", "my model", samples=3, top_k=2, alphas="linear") == {"label": "stop"}
    path, headers, body = keeper.asked[-1]
    assert path == "/predictions/my%20model"
    assert body == b"image"
    ours = {name: value for name, value in headers.items() if name.startswith("X-Mlvgm")}
    assert ours == {"X-Mlvgm-Samples": "3", "X-Mlvgm-Top-K": "2", "X-Mlvgm-Alphas": "linear"}


def test_purify_gives_image_and_figures(client: Client, keeper: Keeper) -> None:
    image, figures = client.purify(b"image", "m", seed=4)
    assert image == b'{"label": "stop"}'
    assert figures == {"label": "stop"}
    assert keeper.asked[-1][1]["X-Mlvgm-Return"] == "purified"


def test_an_expired_key_is_renewed(client: Client, keeper: Keeper) -> None:
    keeper.valid["inference"] = "expired long ago"
    assert client.predict(b"image", "m")["label"] == "stop"
    assert [path for path, _, _ in keeper.asked] == ["/predictions/m", "/token?type=inference", "/predictions/m"]


def test_a_key_that_another_client_renewed_is_read_again(
    client: Client, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = client.key("inference")
    keeper.renew("inference")
    fresh = client.key("inference")
    answers = iter([stale, fresh, fresh])
    monkeypatch.setattr(client, "key", lambda _: next(answers))
    assert client.predict(b"image", "m")["label"] == "stop"
    assert not any(path.startswith("/token") for path, _, _ in keeper.asked)


def test_management_has_a_key_of_its_own(client: Client, keeper: Keeper) -> None:
    keeper.valid["management"] = "expired"
    assert client.ready_workers("m") == 1
    client.set_workers("m", 2)
    assert "min_worker=2&max_worker=2&synchronous=true" in keeper.asked[-1][0]


def test_a_refusal_carries_the_reason_and_the_status(client: Client) -> None:
    with pytest.raises(ServerError, match="answered 400: truncated") as caught:
        client.predict(b"bad", "m")
    assert caught.value.status == 400


def test_when_even_the_new_key_is_refused(client: Client, keeper: Keeper) -> None:
    keeper.valid["API"] = "other"
    keeper.valid["inference"] = "other"
    with pytest.raises(ServerError, match="Token Authorization failed"):
        client.predict(b"image", "m")


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no server there") as caught:
        Client("http://127.0.0.1:9").predict(b"image", "m")
    assert caught.value.status == 0


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"inference": 3}'])
def test_a_damaged_key_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(ServerError, match="no inference key"):
        Client(key_file=tmp_path / "keys").predict(b"image", "m")


@pytest.mark.parametrize("url", ["https://127.0.0.1", "ftp://x", "http://"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ServerError, match="not the http://"):
        Client(url)
