import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy import trial
from deploy.server import PROJECT
from tests.deploy.pair import WAIT, needs_both, picture, tiny_store, until


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_it_says_how_to_start_and_how_to_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pair"
    assert trial.main([str(folder)]) == 0
    etc = folder / "etc"
    said = capsys.readouterr().out
    key, port = re.findall(r'X-Api-Key: (\w{48})" -T sign.png https://localhost:(\d+)/', said)[0]
    conf = (etc / "nginx.conf").read_text()
    assert f"listen 127.0.0.1:{port} ssl" in conf
    assert "/run/mlvgm" not in conf
    assert f"--nginx-conf {etc / 'nginx.conf'} --port " in said
    clients = etc / "private" / "clients.map"
    assert clients.read_text() == f'"{key}" me;\n'
    assert clients.stat().st_mode & 0o077 == 0
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-text", "-in", str(etc / "private" / "tls.crt")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "DNS:localhost" in shown

    assert trial.main([str(folder)]) == 1
    assert "is there already" in capsys.readouterr().err


@pytest.mark.server
def test_what_it_says_works(nvae_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    needs_both()
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    folder = tmp_path_factory.mktemp("p")
    store = tiny_store(nvae_bundle, folder / "store", batch_delay_ms=20)
    (folder / "sign.png").write_bytes(picture())
    said = subprocess.run(
        [sys.executable, "-m", "deploy.trial", str(folder / "t")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    state, _, *words = said[1].split()
    name, _, value = state.partition("=")
    command = [sys.executable, *words, "--model-store", str(store), "--workers", "1"]
    pair = subprocess.Popen(command, cwd=PROJECT, env=os.environ | {name: value})
    asked = [*shlex.split(said[3].replace("MODEL", "tiny")), "--silent"]

    def answer() -> str:
        assert pair.poll() is None
        return subprocess.run(asked, cwd=folder, capture_output=True, text=True).stdout

    try:
        until(lambda: "label" in answer(), WAIT)
        time.sleep(2)  # it goes on, though files have changed
        assert "label" in answer()
    finally:
        pair.terminate()
        assert pair.wait(WAIT) == 0


def test_without_openssl_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert trial.main([str(tmp_path / "pair")]) == 1
    assert "apt install openssl" in capsys.readouterr().err
