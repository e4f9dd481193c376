import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy import trial


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_it_says_how_to_start_and_how_to_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pair itself runs with such a folder in test_pair.py and test_nginx.py."""
    folder = tmp_path / "pair"
    assert trial.main([str(folder)]) == 0
    said = capsys.readouterr().out
    key, port = re.findall(r'X-Api-Key: (\w{48})" -T sign.png https://localhost:(\d+)/', said)[0]
    conf = (folder / "nginx.conf").read_text()
    assert f"listen 127.0.0.1:{port} ssl" in conf
    assert "/run/mlvgm" not in conf
    assert f"--nginx-conf {folder / 'nginx.conf'} --port " in said
    clients = folder / "private" / "clients.map"
    assert clients.read_text() == f'"{key}" me;\n'
    assert clients.stat().st_mode & 0o077 == 0
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-text", "-in", str(folder / "private" / "tls.crt")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "DNS:localhost" in shown

    assert trial.main([str(folder)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_without_openssl_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert trial.main([str(tmp_path / "pair")]) == 1
    assert "apt install openssl" in capsys.readouterr().err
