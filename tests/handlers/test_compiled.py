"""Compiled programs: the same numbers in every size, what is done where nothing can be compiled, where code is kept."""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from handlers.runtimes import compiled
from handlers.runtimes.cache import VARIABLE
from handlers.runtimes.compiled import CACHE, Compiled, use_private_cache

SIZES = (1, 3, 8)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv(CACHE, str(tmp_path / "inductor"))
    for function in (use_private_cache, compiled._warn):
        function.cache_clear()
    yield
    torch._dynamo.reset()


def program() -> nn.Module:
    """Of `torch.export`, with a dynamic batch."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 4))
    batch = torch.export.Dim("B", min=1)
    made = torch.export.export(layers.eval().requires_grad_(False), (images(7),), dynamic_shapes=({0: batch},))
    return made.module(check_guards=False)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == compiled.__name__]


def images(rows: int) -> torch.Tensor:
    return torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def test_some_sizes_are_compiled_once_with_their_own_shapes() -> None:
    shapes: list[tuple[Any, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        shapes.extend(tuple(tensor.shape) for tensor in inputs if tensor.shape[1:] == (3, 8, 8))
        return graph.forward

    module = program()
    fast = Compiled(module, SIZES, backend)
    for rows in (*SIZES, 2, 4, *SIZES):
        assert torch.equal(fast(images(rows)), module(images(rows)))
    assert shapes == [(rows, 3, 8, 8) for rows in SIZES]
    assert all(type(shape[0]) is int for shape in shapes)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@torch.no_grad()
def test_inductor_gives_the_numbers_of_the_program(caplog: pytest.LogCaptureFixture) -> None:
    module = program()
    fast = Compiled(module, SIZES)
    for rows in (1, 3):
        assert torch.allclose(fast(images(rows)), module(images(rows)), rtol=0, atol=1e-6)
    assert not said(caplog)
    assert any(Path(os.environ[CACHE]).rglob("*.cpp"))


@torch.no_grad()
def test_without_a_compiler_programs_run_as_they_are_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tried = []

    def broken(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError("Cannot find a working triton installation\nmuch more")

    for _ in range(2):  # two stages
        module = program()
        slow = Compiled(module, SIZES, broken)
        for rows in (1, 3):
            assert torch.equal(slow(images(rows)), module(images(rows)))
    assert len(tried) == 2
    assert said(caplog) == [
        "programs run several times slower than they could, because PyTorch cannot compile them: "
        "Cannot find a working triton installation"
    ]


@torch.no_grad()
def test_wrong_inputs_fail_and_the_program_stays_compiled(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        return lambda *tensors: calls.append(1) or graph.forward(*tensors)

    fast = Compiled(program(), (1, 2), backend)
    with pytest.raises(Exception, match=r"shape|size|channels"):
        fast(torch.zeros(1, 4, 8, 8))
    fast(images(2))
    assert len(calls) == 1
    assert not said(caplog)


def test_what_is_compiled_is_kept_where_only_this_user_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def folder(home: Path) -> Path:
        monkeypatch.delenv(VARIABLE, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        monkeypatch.delenv(CACHE)
        use_private_cache.cache_clear()
        use_private_cache()
        return Path(os.environ[CACHE])

    own = folder(tmp_path / "home")
    assert own == tmp_path / "home" / "mlvgm" / "inductor"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert folder(tmp_path / "home") == own  # the next start finds it
    own.chmod(0o777)
    (tmp_path / "file").touch()
    for home in (tmp_path / "home", tmp_path / "file"):
        other = folder(home)
        assert not other.is_relative_to(home)
        assert stat.S_IMODE(other.stat().st_mode) == 0o700
        other.rmdir()
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: (tmp_path / "none" / "none").mkdir())
    with pytest.raises(KeyError):
        folder(tmp_path / "file")


def test_a_folder_that_was_chosen_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    use_private_cache()
    assert os.environ[CACHE] == str(tmp_path)
