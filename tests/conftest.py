"""Fixtures that several folders share: tiny bundles, made once per run."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from deploy.server import Server
from handlers.client import Client
from handlers.runtimes.cache import VARIABLE
from tests import bundles
from tests.handlers.fake_server import FakeServer, serving, serving_https

# Properties say what must hold, not how fast: a busy machine must not fail them.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Behind nohup or in the background of a shell, the tests and all that they start would ignore these signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each process takes whole files; one of them takes all that start or kill servers, one after the other."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # not "loadgroup", which pytest 9.2 makes of no effect (xdist 3.8)
        def _split_scope(self, nodeid: str) -> str:
            file, _, _ = nodeid.partition("::")
            servers = file.startswith(("tests/deploy/", "tests/stress/"))
            return "servers" if servers or "mark.server" in (config.rootpath / file).read_text() else file

    return Scheduling(config, log)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes do not name a test: with a time among them, each process would collect tests of other names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One of this run, also for the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    """Of the server that the module has started."""
    return server.client(60)


@pytest.fixture
def fake_server(tmp_path: Path) -> Iterator[FakeServer]:
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def https_server(tmp_path: Path) -> Iterator[tuple[FakeServer, Path]]:
    """One with a certificate that nobody signed, and the file of that certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    with serving_https(tmp_path) as (server, certificate):
        yield server, certificate


@pytest.fixture(scope="session")
def nvae_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the NVAE kind whose encoder overflows on a purely white image."""
    folder = tmp_path_factory.mktemp("bundles") / "nvae"
    bundles.write_nvae(folder, nan_on_white=True)
    return folder


@pytest.fixture(scope="session")
def half_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in half precision whose encoder overflows on a purely white image, and not in fp32."""
    folder = tmp_path_factory.mktemp("bundles") / "half"
    bundles.write_half(folder)
    return folder


@pytest.fixture(scope="session")
def style_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the StyleGAN2 kind."""
    folder = tmp_path_factory.mktemp("bundles") / "style"
    bundles.write_stylegan(folder)
    return folder


@pytest.fixture(scope="session")
def noisy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the StyleGAN2 kind that adds noise to its input."""
    folder = tmp_path_factory.mktemp("bundles") / "noisy"
    bundles.write_stylegan(folder, input_noise_l2=2.0)
    return folder
