"""The machine as a test wants it: ports that are free, packages that are not installed."""

import contextlib
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec

import pytest

from deploy.server import PORTS, Server, free_ports


def free_port() -> int:
    """The first of those that a server takes."""
    return free_ports(PORTS)


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[Server]:
    """``server``, to be started within, and stopped whatever becomes of it."""
    try:
        yield server
    finally:
        server.stop()


def uninstall(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make ``packages`` look as if they were not installed."""
    find_spec = importlib.util.find_spec

    def blind(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in packages else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", blind)
