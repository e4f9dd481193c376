"""The machine as a test wants it: ports that are free, packages that are not installed, processes that are killed."""

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
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


def killed(job: Callable[[], object], calls: int) -> bool:
    """Whether ``job``, in a process of its own, was killed at its n-th call of the system, as Python reports them."""
    child = os.fork()
    if child == 0:
        left = [calls]

        def count(event: str, _: object) -> None:
            if event.startswith(("open", "os.", "fcntl.")):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            job()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
