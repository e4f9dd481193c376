import asyncio
import email.utils
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from handlers import client as module
from handlers.client import AsyncClient, Client
from handlers.errors import InputError
from handlers.reply import ServerError
from tests.handlers.fake_server import ANSWER, FakeServer


@pytest.fixture
def client(fake_server: FakeServer) -> Client:
    url = f"http://127.0.0.1:{fake_server.server_port}"
    return Client(url, management_url=url, key_file=fake_server.key_file, timeout=10)


def test_options_travel_as_headers(client: Client, fake_server: FakeServer) -> None:
    assert client.predict(b"image", "my model", samples=3, top_k=2, alphas="linear") == {"label": "stop"}
    path, headers, body = fake_server.asked[-1]
    assert path == "/predictions/my%20model"
    assert body == b"image"
    ours = {name.title(): value for name, value in headers.items() if name.lower().startswith("x-mlvgm")}
    assert ours == {"X-Mlvgm-Samples": "3", "X-Mlvgm-Top-K": "2", "X-Mlvgm-Alphas": "linear"}


def test_purify_gives_image_and_figures(client: Client, fake_server: FakeServer) -> None:
    image, figures = client.purify(b"image", "m", seed=4)
    assert image == b'{"label": "stop"}'
    assert figures == ANSWER
    assert fake_server.asked[-1][1]["X-Mlvgm-Return"] == "purified"


def test_an_expired_key_is_renewed(client: Client, fake_server: FakeServer) -> None:
    fake_server.valid["inference"] = "expired long ago"
    assert client.predict(b"image", "m")["label"] == "stop"
    assert [path for path, _, _ in fake_server.asked] == ["/predictions/m", "/token?type=inference", "/predictions/m"]


def test_of_two_threads_that_are_refused_one_renews_the_key(client: Client, fake_server: FakeServer) -> None:
    """Each renewal invalidates the key before, which the other thread may be about to send."""
    asked = [httpx.Request("POST", client._url.join(f"/predictions/{name}")) for name in "ab"]
    flows = [module._Bearer(client, "inference").auth_flow(request) for request in asked]
    refused = [httpx.Response(400, content=b"InvalidKeyException", request=next(flow)) for flow in flows]
    renewal = flows[0].send(refused[0])
    sent: list[httpx.Request] = []
    other = threading.Thread(target=lambda: sent.append(flows[1].send(refused[1])))
    other.start()
    fake_server.renew("inference")
    assert flows[0].send(httpx.Response(200, request=renewal)) is asked[0]
    other.join()
    assert sent == [asked[1]]
    assert asked[0].headers["Authorization"] == asked[1].headers["Authorization"] == f"Bearer {client.key('inference')}"


def test_a_key_that_another_client_renewed_is_read_again(
    client: Client, fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = client.key("inference")
    fake_server.renew("inference")
    fresh = client.key("inference")
    answers = iter([stale, fresh, fresh])
    monkeypatch.setattr(client, "key", lambda _: next(answers))
    assert client.predict(b"image", "m")["label"] == "stop"
    assert not any(path.startswith("/token") for path, _, _ in fake_server.asked)


def test_management_has_a_key_of_its_own(client: Client, fake_server: FakeServer) -> None:
    fake_server.valid["management"] = "expired"
    assert client.ready_workers("m") == 1
    client.set_workers("m", 2)
    assert "min_worker=2&max_worker=2&synchronous=true" in fake_server.asked[-1][0]
    client.set_workers("m", 3, wait=False)
    assert "min_worker=3&max_worker=3&synchronous=false" in fake_server.asked[-1][0]


def test_a_refusal_carries_the_reason_and_the_status(client: Client) -> None:
    with pytest.raises(ServerError, match="answered 400: truncated") as caught:
        client.predict(b"bad", "m")
    assert caught.value.status == 400


def test_when_even_the_new_key_is_refused(client: Client, fake_server: FakeServer) -> None:
    fake_server.valid["API"] = "other"
    fake_server.valid["inference"] = "other"
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


@pytest.mark.parametrize("url", ["ftp://x", "http://", "//", "http://[::1", "https://:8443", "x:y:z"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ServerError):
        Client(url)


def test_an_option_that_cannot_travel_is_refused_before_it_does(client: Client, fake_server: FakeServer) -> None:
    with pytest.raises(InputError, match="alphas must be printable ASCII"):
        client.predict(b"image", "m", alphas="ü\r\nX-Api-Key: 1")
    with pytest.raises(InputError, match="api_key"):
        Client(api_key="two\nlines")
    with pytest.raises(TypeError, match="no option 'sample'"):
        client.predict(b"image", "m", sample=3)  # type: ignore[call-arg]
    assert not fake_server.asked


def test_calls_share_a_connection(client: Client, fake_server: FakeServer) -> None:
    with client:
        for _ in range(5):
            client.predict(b"image", "m")
    assert len(fake_server.asked) == 5
    assert len(fake_server.callers) == 1


def busy(wait: str, status: int = 503) -> tuple[int, dict[str, str], bytes]:
    return status, {"Retry-After": wait}, b'{"error": "busy"}'


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a client waited for, instead of waiting."""
    found: list[float] = []

    async def pause(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(module.time, "sleep", found.append)
    monkeypatch.setattr(module.asyncio, "sleep", pause)
    return found


def test_a_busy_server_is_asked_again_in_time(client: Client, fake_server: FakeServer, pauses: list[float]) -> None:
    soon = email.utils.formatdate(time.time() + 20, usegmt=True)
    fake_server.first = [busy("2"), busy("1", 429), busy(soon)]
    assert client.predict(b"image", "m") == {"label": "stop"}
    assert [body for _, _, body in fake_server.asked] == [b"image"] * 4
    assert 2 <= pauses[0] <= 2.5
    assert 1 <= pauses[1] <= 1.5
    assert 0 < pauses[2] <= 20.5


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "never"}, {"Retry-After": "3600"}, {"Retry-After": "9" * 400}])
def test_where_it_does_not_say_or_wants_too_much_the_error_comes_at_once(
    client: Client, fake_server: FakeServer, pauses: list[float], headers: dict[str, str]
) -> None:
    fake_server.first = [(503, headers, b'{"error": "busy"}')]
    with pytest.raises(ServerError, match="503: busy") as caught:
        client.predict(b"image", "m")
    assert (caught.value.status, pauses, len(fake_server.asked)) == (503, [], 1)


def test_it_gives_up_in_the_end(fake_server: FakeServer, pauses: list[float]) -> None:
    fake_server.first = [busy("1")] * 9
    with pytest.raises(ServerError, match="503: busy"), Client(f"http://127.0.0.1:{fake_server.server_port}") as client:
        client.predict(b"image", "m")
    assert (len(pauses), len(fake_server.asked)) == (3, 4)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, {}, b"<html>Please log in</html>"), "not of this server"),
        ((200, {}, b"[1"), "not of this server"),
        ((200, {}, b"[]"), "not of this server"),
        ((200, {}, b"[" * 100_000), "not of this server"),
        ((400, {}, b'{"error":' * 100_000), "answered 400: "),
        ((302, {"Location": "https://elsewhere/"}, b""), "answered 302: look at https://elsewhere/"),
        ((500, {}, b""), "answered 500: Internal Server Error"),
        ((502, {}, b"\xff\xfe<html>"), "answered 502: "),
        ((400, {}, b'{"answers": [{"error": "a", "status": 400}, {"error": "b"}]}'), "image 0: a; image 1: b"),
        ((413, {}, b"[]"), "answered 413: "),
    ],
)
def test_answers_of_somebody_else(
    client: Client, fake_server: FakeServer, answer: tuple[int, dict[str, str], bytes], words: str
) -> None:
    fake_server.first = [answer]
    with pytest.raises(ServerError, match=words) as caught:
        client.predict(b"image", "m")
    assert caught.value.status == answer[0]
    fake_server.first = [(200, {}, b"{}"), (200, {}, b"{}")]
    for call in (lambda: client.purify(b"image", "m"), lambda: client.predict_many([b"image"], "m")):
        with pytest.raises(ServerError, match="not of this server"):
            call()


def test_https_with_a_key_and_an_authority_of_ones_own(https_server: tuple[FakeServer, Path], tmp_path: Path) -> None:
    server, certificate = https_server
    url = f"https://localhost:{server.server_port}"
    with Client(url, api_key="secret", ca_file=certificate) as client:
        assert client.predict(b"image", "m", samples="auto")["label"] == "stop"
    path, headers, _ = server.asked[-1]
    assert path == "/predictions/m"
    assert (headers["X-Api-Key"], headers["X-Mlvgm-Samples"]) == ("secret", "auto")
    with pytest.raises(ServerError, match=r"--ca-file"):
        Client(url, api_key="secret").predict(b"image", "m")
    (tmp_path / "empty.pem").touch()
    for file, words in ((tmp_path / "empty.pem", "no certificate"), (tmp_path / "none.pem", "cannot be read")):
        with pytest.raises(ServerError, match=words):
            Client(url, ca_file=file)


def test_the_same_for_asyncio(https_server: tuple[FakeServer, Path], pauses: list[float]) -> None:
    server, certificate = https_server
    server.first = [busy("1")]

    async def ask() -> Any:
        url = f"https://localhost:{server.server_port}/"
        async with AsyncClient(url, api_key="secret", ca_file=certificate) as client:
            one = await client.predict(b"image", "m")
            several = await client.predict_many([b"a", b"b"], "m")
            return one["label"], len(several), await client.purify(b"image", "m", seed=1)

    label, count, (image, figures) = asyncio.run(ask())
    assert (label, count, figures, image[:1]) == ("stop", 2, ANSWER, b"{")
    assert len(pauses) == 1
    assert server.asked[-1][1]["X-Mlvgm-Seed"] == "1"
    with pytest.raises(ServerError, match="no server there"):
        asyncio.run(AsyncClient("http://127.0.0.1:9").predict(b"image", "m"))


def test_a_server_that_says_nothing(fake_server: FakeServer) -> None:
    with Client(f"http://127.0.0.1:{fake_server.server_port}", timeout=0.2) as client:
        fake_server.shutdown()
        with pytest.raises(ServerError, match=r"no answer within 0.2 s") as caught:
            client.predict(b"image", "m")
    assert caught.value.status == 0
