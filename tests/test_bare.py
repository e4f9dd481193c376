"""Where nothing but the core's own requirements is installed, the core imports and every verb explains itself."""

import configparser
import contextlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlvgm.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]
OURS = ("handlers", "mlvgm", "export", "deploy", "evaluation", "benchmarks")
IMPORTS = {"pillow": "PIL", "pyyaml": "yaml"}  # where the name of a package is not that of what one imports
# What is imported only when it is to be used: each adapter may lack its own library, and nothing else.
ADAPTERS = "handlers.runtimes."
LIBRARIES = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "torch")

# An installed package that the core does not require is as good as absent: nothing of it can be imported.
BARE = """
import sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if path is None and first not in {allowed!r} and first not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Bare())
"""


def bare() -> str:
    """The program that takes everything away but the standard library, our packages and their requirements."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = [line.partition(">")[0].strip() for line in config["options"]["install_requires"].split()]
    for name in required:  # and what they require themselves, for no extra
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # older Python alone wants some
            lines = [line for line in importlib.metadata.requires(name) or () if "extra ==" not in line]
            required += {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines} - {*required}
    allowed = {IMPORTS.get(name, name) for name in required} | {
        "handlers",
        "export",
        "mlvgm",
        "deploy",
        "evaluation",
        "benchmarks",
    }
    assert {"numpy", "PIL", "yaml"} < allowed
    return BARE.format(allowed=allowed)


def modules(package: str) -> list[str]:
    paths = sorted((ROOT / package).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def run(program: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", bare() + program, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["torch", "onnx", "onnxruntime", "openvino", "psutil", "matplotlib", "scipy", "ray"])
def test_bare_means_bare(name: str) -> None:
    assert "ModuleNotFoundError" in run(f"import {name}").stderr


def test_every_module_of_the_core_imports() -> None:
    names = modules("handlers") + modules("mlvgm/cli")
    assert len(names) > 30
    program = f"""
import importlib
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith({ADAPTERS!r}) or error.name not in {LIBRARIES}:
            raise
"""
    done = run(program, *names)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(verb: str) -> None:
    done = run("from mlvgm.cli.main import main\nmain(sys.argv[1:])", verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: mlvgm {verb}" in done.stdout


def test_a_verb_says_which_library_it_lacks() -> None:
    program = "from mlvgm.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    done = run(program, "export", "--recipe", "road-signs")
    assert (done.returncode, done.stdout) == (2, "")
    assert "torch is not installed: pip install 'torch" in done.stderr
    assert done.stderr.count("\n") == 1


def test_console_scripts_find_every_package(tmp_path: Path) -> None:
    """They start with the folder of the scripts, not with that of the checkout, on the path."""
    program = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    names = ["mlvgm.cli.main", "evaluation.robustness", "deploy.pair", "deploy.supervisor", "deploy.trial"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program, *names], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
