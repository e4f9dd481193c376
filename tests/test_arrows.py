"""Which folder may import which: what runs in production needs nothing of what measures or commands it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "handlers": {"handlers"},
    "mlvgm": {"mlvgm", *(f"handlers.{name}" for name in ("errors", "fields", "image", "manifest", "runtimes"))},
    "export": {"export", "mlvgm", "handlers"},
    "deploy": {"deploy", "handlers"},
    "evaluation": {"evaluation", "export", "mlvgm", "handlers"},
    "benchmarks": {"benchmarks", "evaluation", "deploy", "export", "mlvgm", "handlers"},
    "mlvgm/cli": {"mlvgm.cli", "tests.stress", "benchmarks", "evaluation", "deploy", "export", "mlvgm", "handlers"},
}
OURS = {folder.partition("/")[0] for folder in MAY_IMPORT} | {"tests"}


def may_import(name: str, allowed: set[str]) -> bool:
    """Whether ``allowed`` covers the full ``name``; the command line has to be allowed by its own name."""
    if name.partition(".")[0] not in OURS:
        return True
    if f"{name}.".startswith("mlvgm.cli."):
        return "mlvgm.cli" in allowed
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)


def imported(source: str) -> Iterator[str]:
    """Full names of what a module imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(folder: str) -> list[Path]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    own = [path for path in paths if "stand-in" not in path.parts]
    return [path for path in own if folder != "mlvgm" or path.relative_to(ROOT).parts[1] not in ("cli", "__main__.py")]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    paths = modules(folder)
    assert len(paths) >= 4
    for path in paths:
        refused = [n for n in imported(path.read_text(encoding="utf-8")) if not may_import(n, MAY_IMPORT[folder])]
        assert not refused, f"{path} imports {refused}"


@pytest.mark.parametrize(
    "line",
    ["import mlvgm.cli.main", "from mlvgm import cli", "from mlvgm.cli import main", "def f():\n  import mlvgm.cli"],
)
def test_every_way_to_import_is_seen(line: str) -> None:
    (name,) = imported(line)
    assert not may_import(name, MAY_IMPORT["deploy"])
    assert not may_import(name, MAY_IMPORT["mlvgm"])
    assert may_import(name, MAY_IMPORT["mlvgm/cli"])
