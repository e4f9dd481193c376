import os
import signal
import subprocess
import sys

import pytest

from deploy import signals
from deploy.server import PROJECT


@pytest.mark.parametrize("number", signals.STOPS)
def test_a_signal_waits_until_it_is_fetched(number: signal.Signals) -> None:
    with signals.noted():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        with pytest.raises(signals.Stopped, match=number.name):
            signals.pause(60)


def test_an_upgrade_is_noted_and_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "upgrade_requested", False)
    with signals.noted():
        os.kill(os.getpid(), signals.UPGRADE)
        signals.pause(60)
    assert signals.upgrade_requested


def test_signals_are_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with signals.noted():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    signals.pause(0)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_what_nohup_ignores_stays_ignored() -> None:
    program = """
import os, signal
from deploy import signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with signals.noted():
    os.kill(os.getpid(), signal.SIGHUP)
    signals.pause(0.1)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT).returncode == 0


def test_the_kernel_ends_what_is_stuck() -> None:
    """Even in a lock that Python never lets go of, and though no signal that stops it is heeded."""
    program = """
import threading
from deploy import signals
with signals.noted():
    signals.end_by(0.1)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, timeout=900)
    assert done.returncode == -signal.SIGALRM
