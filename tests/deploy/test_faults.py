"""What a running server does when things go wrong: a worker dies or hangs, the queue is full, the disk is full."""

import contextlib
import io
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deploy.server import Server
from deploy.torchserve import TorchServe
from export.archive import ArchiveSettings, build_archive
from handlers.client import Client
from handlers.pipeline import PROGRESS
from handlers.reply import ServerError
from mlvgm.cli.main import main
from tests import bundles
from tests.deploy.pair import until
from tests.machine import free_port, stopped

pytest.importorskip("ts", reason="needs TorchServe")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.server

QUEUE = 3


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLVGM_STATE", str(tmp_path_factory.mktemp("s")))
        yield


@pytest.fixture(scope="module")
def archive(half_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ArchiveSettings(runtime="onnxruntime", threads=1, batch_size=1, queue=QUEUE)
    return build_archive(half_bundle, tmp_path_factory.mktemp("store"), settings)


@pytest.fixture(scope="module")
def server(environment: None, archive: Path) -> Iterator[Server]:
    steps: list[str] = []
    with stopped(TorchServe(free_port())) as server:
        server.start([archive], progress=steps.append)
        until(lambda: "8 rows at once" in server.log.read_text())  # the log may lag behind the answers
        logged = [line[line.index(PROGRESS) :] for line in server.log.read_text().splitlines() if PROGRESS in line]
        assert "encode.onnx loaded in onnxruntime (1 of 3)" in logged[0]
        assert steps == logged[: len(steps)]
        yield server


def picture(number: int = 0, colour: str = "") -> bytes:
    stream = io.BytesIO()
    image = Image.new("RGB", (8, 8), colour) if colour else Image.fromarray(bundles.images(1, seed=number)[0])
    image.save(stream, "PNG")
    return stream.getvalue()


def worker(server: Server) -> Any:
    process = server.process()
    assert process is not None
    (child,) = process.children()
    return child


def status(client: Client, image: bytes) -> int:
    try:
        client.predict(image, "tiny", samples=2)
    except ServerError as error:
        return error.status
    return 200


@contextlib.contextmanager
def hanging(server: Server) -> Iterator[None]:
    process = worker(server)
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def figures(server: Server) -> dict[str, float]:
    """The metrics with their labels, but for the name of this host, as Prometheus reads them."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30).read().decode()
    found = re.findall(r"^(\w+)\{(.*?)Hostname=\"[^\"]*\",(.*?)\} (\S+)$", text, re.M)
    return {f"{name}{{{before}{after}}}": float(value) for name, before, after, value in found}


def test_what_is_measured_shows_on_the_metrics_port(server: Server, client: Client) -> None:
    model = 'ModelName="tiny",'
    before = figures(server)
    assert before[f'mlvgm_rejected{{reason="late",{model}}}'] == 0, "what has not happened yet is 0"
    assert [status(client, image) for image in (picture(1), picture(2), b"no", picture(colour="white"))] == [
        200,
        200,
        400,
        200,
    ]
    expected = {
        f'mlvgm_answers{{status="200",{model}}}': 3,
        f'mlvgm_answers{{status="400",{model}}}': 1,
        f'mlvgm_rejected{{reason="image",{model}}}': 1,
        f'mlvgm_fallbacks{{stage="encode",{model}}}': 1,
        f"mlvgm_request_seconds_count{{{model}}}": 4,
        f"mlvgm_batch_images_sum{{{model}}}": 3,
        f'mlvgm_stage_seconds_count{{stage="decode",{model}}}': 3,
    }
    grown: dict[str, float] = {}
    for _ in range(50):  # TorchServe reads them from the worker's output, after the answers
        after = figures(server)
        grown = {name: after.get(name, 0) - before.get(name, 0) for name in expected}
        if grown == expected:
            break
        time.sleep(0.1)
    assert grown == expected
    assert after[f'mlvgm_stage_seconds_bucket{{stage="decode",{model}le="10.0",}}'] >= 3


def test_more_than_the_queue_holds_is_refused_at_once(
    server: Server, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(QUEUE + 1) as pool:
        with hanging(server):
            waiting = [pool.submit(status, client, picture())]
            time.sleep(2)  # until it is in work: all at once, one could find the queue full before that
            waiting += [pool.submit(status, client, picture(i)) for i in range(QUEUE)]
            time.sleep(2)
            begun = time.monotonic()
            refused = [status(client, picture(i)) for i in range(5)]
            taken = time.monotonic() - begun
            assert main(["ready", "--port", str(server.port), "--timeout", "1"]) == 1, "its worker does nothing"
            assert "tiny: not ready" in capsys.readouterr().out
        assert [future.result(60) for future in waiting] == [200] * (QUEUE + 1), "one in work, the others queued"
    assert refused == [503] * 5
    assert taken < 60, "they did not wait for the worker, which has two minutes"


def test_a_busy_server_is_ready(server: Server, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    """More clients than it has room for: it refuses some, and its worker computes all the time."""
    over = threading.Event()

    def keep_asking() -> set[int]:
        found = set()
        while not over.is_set():
            found.add(status(client, picture()))
        return found

    with ThreadPoolExecutor(QUEUE + 5) as pool:
        asked = [pool.submit(keep_asking) for _ in range(QUEUE + 5)]
        try:
            assert [main(["ready", "--port", str(server.port)]) for _ in range(3)] == [0, 0, 0]
        finally:
            over.set()
        statuses = set().union(*(future.result(60) for future in asked))
    assert 200 in statuses
    assert statuses <= {200, 503}
    assert capsys.readouterr().out.count("tiny: ready") == 3


def test_ready_says_whether_an_answer_comes(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    port = str(server.port)
    assert main(["ready", "--port", port]) == 0
    assert re.fullmatch(r"tiny: ready: answered after [\d.]+ s\n", capsys.readouterr().out)
    assert main(["ready", "--port", port, "--model", "absent"]) == 1
    assert "absent: not ready" in capsys.readouterr().out
    with hanging(server):
        assert main(["ready", "--port", port, "--timeout", "1"]) == 1
    assert "tiny: not ready" in capsys.readouterr().out
    assert main(["ready", "--port", str(free_port())]) == 1
    assert "no server of mlvgm serve is running" in capsys.readouterr().out


def test_a_killed_worker_comes_back_and_no_request_is_lost(server: Server, client: Client) -> None:
    over = threading.Event()

    def keep_asking(number: int) -> list[int]:
        found = []
        while not over.is_set():
            found.append(status(client, picture(number)))
        return found

    first = worker(server).pid
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(keep_asking, i) for i in range(3)]
        try:
            until(lambda: status(client, picture()) == 200)
            worker(server).kill()
            until(lambda: status(client, picture()) == 200)
        finally:
            over.set()
        statuses = {status for future in asked for status in future.result(60)}
    assert statuses <= {200, 500, 503, 507}, "0 would be a request without an answer"
    assert 200 in statuses
    until(lambda: status(client, picture()) == 200)
    assert worker(server).pid != first


def test_a_log_that_can_grow_no_more_costs_no_answer(server: Server, client: Client) -> None:
    """As on a full disk; for the rest of the server's life, so this is the last test here."""
    written = server.log.stat().st_size
    for process in (server.process(), worker(server)):
        assert process is not None
        process.rlimit(psutil.RLIMIT_FSIZE, (written, written))
    images = (picture(), b"no", picture(colour="white"))  # the last makes the worker write an error
    assert [status(client, image) for image in images * 10] == [200, 400, 200] * 10
    assert server.log.stat().st_size == written
    assert figures(server)['mlvgm_fallbacks{stage="encode",ModelName="tiny",}'] > 0
