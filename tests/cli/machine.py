"""The machine as a test wants it: ports that are free, packages that are not installed."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from cli.server import free_ports


def free_port() -> int:
    """The first of the five that a server takes."""
    return free_ports(5)


def uninstall(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make ``packages`` look as if they were not installed."""
    find_spec = importlib.util.find_spec

    def blind(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in packages else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", blind)
