"""deploy/pair.py, really run: nothing in flight is lost, no key is ever stale for long, nothing is left behind."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.server import PORTS, port_is_taken
from handlers.manifest import Manifest
from tests.deploy.pair import WAIT, Pair, needs_both, tiny_store, until

pytestmark = pytest.mark.server
needs_both()
psutil = pytest.importorskip("psutil")


@pytest.fixture(scope="module")
def store(nvae_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(nvae_bundle, tmp_path_factory.mktemp("store"))


@pytest.fixture
def pair(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("p"))
    pair.start(store)
    family = family_of(pair)
    try:
        yield pair
    finally:
        pair.stop()
        assert [process for process in family if not is_gone(process)] == []
        assert not any(port_is_taken(port) for port in (pair.port, *range(pair.server.port, pair.server.port + 5)))


def family_of(pair: Pair) -> list[Any]:
    """java, its worker, nginx and its workers."""
    assert pair.process
    family = psutil.Process(pair.process.pid).children(recursive=True)
    assert {"java", "nginx"} <= {process.name() for process in family}
    return family


def is_gone(process: Any) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def named(pair: Pair, name: str) -> Any:
    return next(process for process in family_of(pair) if process.name() == name)


def test_sigterm_answers_what_is_in_flight_and_leaves_nothing(pair: Pair) -> None:
    with ThreadPoolExecutor(7) as pool:
        asked = [pool.submit(pair.predict) for _ in range(7)]
        until(lambda: connections(pair.server.port) >= 7 or any(future.done() for future in asked))
        assert pair.process
        pair.process.send_signal(signal.SIGTERM)
        pair.process.send_signal(signal.SIGINT)  # impatience does not cut it short
        answers = [future.result(60) for future in asked]
    assert [status for status, _ in answers] == [200] * 7
    assert pair.stop() == 0
    assert not pair.server.key_file.exists()


def connections(port: int) -> int:
    """Of nginx to TorchServe on ``port``."""
    return sum(
        each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port for each in psutil.net_connections("tcp")
    )


def test_keys_and_certificates_are_followed(pair: Pair) -> None:
    """TorchServe's key, renewed by whomever or because its end is near; a client's; and the certificate."""
    client = pair.server.client()
    old = client.key("inference")
    client.renew_key("inference")
    assert client.key("inference") != old
    until(lambda: pair.predict()[0] == 200)

    keys = json.loads(pair.server.key_file.read_text())
    old = keys["inference"]["key"]
    assert keys["inference"]["expiration time"] > "2027"  # by the year that it lasts
    keys["inference"]["expiration time"] = "2026-01-01T00:00:00.123456Z"  # as after a jump of the clock
    pair.server.key_file.write_text(json.dumps(keys))
    until(lambda: old not in pair.server.key_file.read_text())
    until(lambda: pair.predict()[0] == 200)
    assert client.key("inference") != old

    pair.clients.write_text('"another" somebody;\n')
    until(lambda: pair.predict({"X-Api-Key": "another"})[0] == 200)
    assert pair.predict()[0] == 401

    shown = pair.certificate()
    pair.certify()
    until(lambda: pair.certificate() != shown)


def test_a_full_disk_under_the_log_stops_nobody(store: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pair = Pair(tmp_path_factory.mktemp("p"))
    try:
        pair.start(store, stdout="/dev/full")
        assert [pair.predict()[0] for _ in range(3)] == [200] * 3
        assert "No space left on device" in pair.log()
    finally:
        assert pair.stop() == 0


def test_readiness_follows_the_worker(pair: Pair) -> None:
    """A dead worker is seen within seconds, its successor when it has answered; TorchServe says healthy all along."""
    until(lambda: pair.ask("GET", "/v2/health/ready", headers={})[0] == 200)
    worker = next(process for process in family_of(pair) if "model_service_worker" in str(process.cmdline()))
    worker.suspend()  # it cannot be replaced: TorchServe knows nothing of it
    try:
        until(lambda: pair.ask("GET", "/v2/health/ready", headers={})[0] == 503)
        headers = {"Authorization": f"Bearer {pair.server.client().key('inference')}"}
        ping = urllib.request.Request(f"{pair.server.url}/ping", headers=headers)
        assert json.loads(urllib.request.urlopen(ping, timeout=10).read()) == {"status": "Healthy"}
    finally:
        worker.resume()
    until(lambda: pair.ask("GET", "/v2/models/tiny/ready", headers={})[0] == 200)


def renamed(bundle: Path, folder: Path) -> Path:
    """A bundle that calls its classes otherwise."""
    shutil.copytree(bundle, folder)
    manifest = Manifest.read(folder)
    replace(manifest, classes=tuple(name.upper() for name in manifest.classes)).write(folder)
    return folder


def test_an_upgrade_under_load_loses_nothing(
    nvae_bundle: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Twice, so that the second one comes back to the first one's ports; readiness holds all along."""
    store = tiny_store(nvae_bundle, tmp_path / "store", batch_delay_ms=20)
    bundles = [renamed(nvae_bundle, tmp_path / "renamed"), nvae_bundle]
    pair = Pair(tmp_path_factory.mktemp("p"))
    pair.start(store, "--ready-timeout", "60")  # a machine that is slow is ready all the same
    ended = threading.Event()

    def ask() -> list[tuple[int, str]]:
        answers = []
        while not ended.is_set():
            status, answer = pair.predict()
            answers.append((status, answer.get("label", str(answer))))
        return answers

    def watch() -> set[int]:
        statuses = set()
        while not ended.wait(0.2):
            statuses.add(pair.ask("GET", "/v2/health/ready", headers={})[0])
        return statuses

    try:
        until(lambda: pair.ask("GET", "/v2/health/ready", headers={})[0] == 200)
        with ThreadPoolExecutor(5) as pool:
            asking, watching = [pool.submit(ask) for _ in range(4)], pool.submit(watch)
            for count, bundle in enumerate(bundles, 1):
                tiny_store(bundle, store, batch_delay_ms=20)
                assert pair.process
                pair.process.send_signal(signal.SIGUSR2)
                until(lambda count=count: pair.log().count("pair: upgraded") == count, WAIT)  # type: ignore[misc]
            ended.set()
            answers = [future.result(60) for future in asking]
        assert watching.result() == {200}
        assert {status for each in answers for status, _ in each} == {200}
        for each in answers:  # of one client, in order: from one bundle to the next, and never back
            spellings = itertools.groupby(label.isupper() for _, label in each)
            assert [is_upper for is_upper, _ in spellings] == [False, True, False]
        assert [process.name() for process in family_of(pair)].count("java") == 1
    finally:
        pair.stop()
    assert not any(port_is_taken(port) for port in range(pair.server.port, pair.server.port + 10))


def test_an_upgrade_that_fails_changes_nothing(
    nvae_bundle: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A damaged archive; then a good one, and a configuration that nginx does not take; then nothing is wrong, but
    requests in flight have no time.
    """
    store = tiny_store(nvae_bundle, tmp_path / "store", batch_delay_ms=20)
    good = (store / "tiny.mar").read_bytes()
    pair = Pair(tmp_path_factory.mktemp("p"))
    pair.start(store, "--drain", "0")
    try:
        (store / "tiny.mar").write_bytes(good[: len(good) // 2])
        assert pair.process
        pair.process.send_signal(signal.SIGUSR2)
        until(lambda: "not upgraded, the old one goes on" in pair.log(), WAIT)
        assert not pair.predict()[1]["label"].isupper()

        tiny_store(renamed(nvae_bundle, tmp_path / "renamed"), store)
        conf = pair.folder / "etc" / "nginx.conf"
        right = conf.read_text()
        conf.write_text(right + "nonsense;\n")
        pair.process.send_signal(signal.SIGUSR2)
        until(lambda: "nginx rejects its configuration" in pair.log(), WAIT)
        until(lambda: [process.name() for process in family_of(pair)].count("java") == 1)
        assert not pair.predict()[1]["label"].isupper()

        conf.write_text(right)
        pair.process.send_signal(signal.SIGUSR2)
        until(lambda: "pair: upgraded" in pair.log(), WAIT)
        assert pair.predict()[1]["label"].isupper()
    finally:
        pair.stop()


@pytest.mark.parametrize("victim", ["java", "nginx"])
def test_when_one_ends_so_does_the_other(pair: Pair, victim: str) -> None:
    named(pair, victim).kill()
    assert pair.process
    assert pair.process.wait(60) == 1
    assert f"{'TorchServe' if victim == 'java' else 'nginx'} has ended by itself" in pair.log()


def test_a_wrong_change_of_the_configuration_changes_nothing(pair: Pair) -> None:
    conf = pair.folder / "etc" / "nginx.conf"
    conf.write_text(conf.read_text() + "nonsense;\n")
    until(lambda: "nonsense" in pair.log())
    assert pair.predict()[0] == 200


def test_side_by_side_in_containers_of_their_own(store: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """nginx waits for TorchServe's key, and takes the new one when TorchServe has been started anew."""
    pair = Pair(tmp_path_factory.mktemp("p"))
    nginx, torchserve = pair.run(store, "--only", "nginx"), None
    try:
        for _ in range(2):
            torchserve = pair.run(store, "--only", "torchserve")
            until(lambda: answers(pair), WAIT)
            assert stop(torchserve) == 0
            assert pair.predict() == (503, {"error": "busy or restarting: try again"})
    finally:
        codes = [stop(process) for process in (nginx, torchserve) if process]
    assert codes == [0, 0]


def stop(process: "subprocess.Popen[bytes]") -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(WAIT)


def answers(pair: Pair) -> bool:
    try:
        return pair.predict()[0] == 200
    except ConnectionError:
        return False


def test_what_cannot_be_served_ends_the_pair(
    store: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with zipfile.ZipFile(store / "tiny.mar") as good, zipfile.ZipFile(tmp_path / "tiny.mar", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            bad.writestr(name, content[:-1] + b"?" if name.endswith("classify.onnx.data") else content)
    pair = Pair(tmp_path_factory.mktemp("p"))
    assert pair.run(tmp_path).wait(WAIT) == 1
    assert "classify.onnx.data: its SHA-256 differs" in pair.log()
    assert not any(port_is_taken(port) for port in (pair.port, *range(pair.server.port, pair.server.port + 5)))


def test_an_empty_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    pair = Pair(tmp_path)
    assert pair.run(tmp_path / "store").wait(60) == 1
    assert f"pair: {tmp_path / 'store'}: no archive there" in pair.log()


def test_a_torchserve_that_hangs_is_started_again(store: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pair = Pair(tmp_path_factory.mktemp("p"))
    try:
        pair.start(store, "--hang-timeout", "5")
        assert pair.process
        children = psutil.Process(pair.process.pid).children()
        nginx = next(process for process in children if process.name() == "nginx")
        nginx.suspend()  # so it takes no new configuration for now, but its workers go on
        named(pair, "java").suspend()
        until(lambda: ready(pair) == 503)
        upstream = pair.state / "upstream.conf"
        until(lambda: f"127.0.0.1:{pair.server.port + PORTS} " in upstream.read_text(), WAIT)
        # The new TorchServe answers, but nginx still asks the former one.
        for _ in range(30):
            assert ready(pair) == 503
            time.sleep(0.1)
        nginx.resume()
        until(lambda: ready(pair) == 200, WAIT)
        assert pair.predict()[0] == 200
        assert "it is started again" in pair.log()
        assert [process.name() for process in family_of(pair)].count("java") == 1
    finally:
        assert pair.stop() == 0


def ready(pair: Pair) -> int:
    return pair.ask("GET", "/v2/health/ready", headers={})[0]


def test_a_folder_belongs_to_one_pair(pair: Pair, store: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whether the second has other ports or the same ones."""
    other = Pair(tmp_path_factory.mktemp("p"))
    other.state = pair.state
    assert other.run(store).wait(WAIT) == 1
    assert "is in use already" in other.log()
    other.server = pair.server
    assert other.run(store, "--only", "torchserve").wait(WAIT) == 1
    assert f"a server is running on port {pair.server.port} already" in other.log()
    assert pair.predict()[0] == 200
    assert pair.process
    assert pair.process.poll() is None


def test_nobody_need_read_what_it_writes(store: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A full pipe as the standard output, and as that for errors."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 1000)
    os.set_blocking(writing, True)
    pair = Pair(tmp_path_factory.mktemp("p"))
    try:
        pair.start(store, output=writing)
        assert {pair.ask("GET", "/v2/health/live", headers={})[0] for _ in range(300)} == {200}
        assert pair.predict()[0] == 200
    finally:
        assert pair.stop() == 0
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.5, 3.0])
def test_a_signal_while_it_starts_leaves_nothing(
    store: Path, tmp_path_factory: pytest.TempPathFactory, seconds: float
) -> None:
    pair = Pair(tmp_path_factory.mktemp("p"))
    process = pair.run(store)
    time.sleep(seconds)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT) in (0, -signal.SIGTERM)
    assert [child for child in family if not is_gone(child)] == []
    assert "Traceback" not in pair.log()
    assert not pair.server.key_file.exists()
