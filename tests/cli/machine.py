"""The machine as a test wants it: ports that are free, packages that are not installed."""

import importlib.util
import random
from importlib.machinery import ModuleSpec

import pytest

from cli.server import port_is_taken


def free_port() -> int:
    """The first of five free ports in a row, below those that the system hands out by itself."""
    while True:
        port = random.randrange(20_000, 30_000)
        if not any(port_is_taken(port + i) for i in range(5)):
            return port


def uninstall(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make ``packages`` look as if they were not installed."""
    find_spec = importlib.util.find_spec

    def blind(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in packages else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", blind)
