"""The map of the exceptions in the docstring of `handlers.errors` is the territory."""

import ast
import re
from pathlib import Path

from handlers import errors

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("handlers", "mlvgm", "export", "deploy", "evaluation", "benchmarks")


def declared() -> dict[str, str]:
    """Each exception of ours in the map, and the one it stands under."""
    found: dict[str, str] = {}
    above = {-4: ""}
    for indent, name in re.findall(r"^( *)(\w+) {2,}", errors.__doc__ or "", re.MULTILINE):
        found[name] = above[len(indent) - 4]
        above[len(indent)] = name
    return found


def defined() -> dict[str, str]:
    """Each class of ours that is an error by its name or its base, and its first base."""
    found = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.bases:
                base = ast.unparse(node.bases[0]).rpartition(".")[2]
                if node.name.endswith(("Error", "Missing")) or base.endswith("Error"):
                    found[node.name] = "" if base == "Exception" else base
    return found


def test_every_exception_stands_in_the_map() -> None:
    assert defined() == declared()
