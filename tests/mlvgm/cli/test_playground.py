import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mlvgm.cli.main import main
from tests.machine import free_port

ROOT = Path(__file__).parents[3]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["playground", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_bundle_or_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert "not both" in refused(["build/road-signs", "--url", "http://127.0.0.1:1"], capsys)


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} is taken" in refused(["x", "--page-port", port], capsys)


# Says where the program connects to.
PROGRAM = """
import sys
def note(event, given):
    if event == "socket.connect" and isinstance(given[1], tuple) and given[1][0] not in ("127.0.0.1", "::1"):
        print("connects to", given[1], file=sys.stderr)
    if event == "socket.getaddrinfo" and given[0] not in ("127.0.0.1", "localhost", None):
        print("asks for", given[0], file=sys.stderr)
sys.addaudithook(note)
from mlvgm.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_stays_until_it_is_told_to_stop_calls_nobody_and_leaves_nothing(nvae_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs Gradio: pip install '.[playground]'")
    port = str(free_port())
    command = [sys.executable, "-c", PROGRAM, "playground", str(nvae_bundle), "--page-port", port]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, cwd=ROOT, **pipes) as running:
        assert running.stdout
        assert running.stderr
        line = running.stdout.readline()
        assert line == f"http://127.0.0.1:{port}/ shows tiny; Ctrl-C ends it\n"
        assert "Not possible: the bundle tiny does not say what recipe" in httpx.get(f"http://127.0.0.1:{port}/").text
        running.send_signal(signal.SIGTERM)
        assert running.wait(120) == 0
        said = running.stderr.read()
        assert "connects to" not in said
        assert "asks for" not in said
    assert list(tmp_path.iterdir()) == []


def test_without_either_there_must_be_a_server_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("gradio", reason="needs Gradio: pip install '.[playground]'")
    monkeypatch.setenv("MLVGM_STATE", str(tmp_path))
    assert "no server of mlvgm serve is running" in refused([], capsys)
