import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.errors import CliError
from mlvgm.cli.main import VERBS, main

ROOT = Path(__file__).parents[3]


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {verb}\s", text, re.MULTILINE) for verb in VERBS)


def test_alone_it_lists_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")} == set(VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"mlvgm-serve \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"mlvgm {verb}" in capsys.readouterr().out.partition("Example")[2]


@pytest.mark.parametrize(
    "words", [["--help"], *([verb, "--help"] for verb in ("archive", "serve", "predict", "doctor"))]
)
def test_help_needs_no_optional_library(words: list[str]) -> None:
    program = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxruntime", "openvino", "ts", "model_archiver", "psutil"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from mlvgm.cli.main import main
main({words!r})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ["frobnicate"],
        ["predict"],
        *(["serve", "--port", port] for port in ("many", "0", "65532")),
        ["serve", "--workers", "0"],
        ["ready", "--timeout", "0"],
    ],
)
def test_wrong_words_end_with_usage_and_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: mlvgm" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["archive", "/nonexistent/bundle"],
        ["serve", "--model-store", "/nonexistent"],
        ["serve", "--dev", "/nonexistent"],
        ["serve", "--dev", "/nonexistent", "--detach"],
        ["predict", "x.png", "--port", "9"],
        ["predict", __file__, "--port", "9", "--model", "m"],
    ],
)
def test_what_the_user_can_mend_is_one_line_and_2(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLVGM_STATE", str(tmp_path))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mlvgm {words[0]}: ")
    assert error.count("\n") == 1


def run_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("mlvgm.cli.doctor.run", fail)
    return main(["doctor"])


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_with(ZeroDivisionError(), monkeypatch)


def test_a_missing_library_is_named_with_its_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("nosuch", "foolbox", "evaluation"):
        assert run_with(ModuleNotFoundError("gone", name=package), monkeypatch) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[0] == "mlvgm doctor: nosuch is not installed: pip install 'nosuch'"
    assert error[1].startswith("mlvgm doctor: foolbox is not installed: pip install 'foolbox>=")
    assert error[2].startswith("mlvgm doctor: evaluation is not in this installation")
    with pytest.raises(ModuleNotFoundError):
        run_with(ModuleNotFoundError("our own slip", name="handlers.nosuch"), monkeypatch)


def test_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_with(CliError("two\nlines"), monkeypatch) == 2
    assert run_with(FileNotFoundError(2, "No such file", "x"), monkeypatch) == 2
    assert run_with(KeyboardInterrupt(), monkeypatch) == 130


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_standard_stream_that_is_closed_is_no_file_of_ours(closed: int, tmp_path: Path) -> None:
    """A file would take its number, and get what is printed."""
    code = "import os, sys; from mlvgm.cli.main import main; main([]); "
    code += f"number = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_RDWR); assert number > 2, number; "
    code += "print('é\u0394'); print('said', file=sys.stderr)"
    command = f'"{sys.executable}" -c "$0" {closed}>&-'
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command, code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert closed == 1 or done.stdout.endswith("\\xe9\\u0394\n")
    assert "Traceback" not in done.stderr


def test_control_characters_of_others_are_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(CliError("a server said \033[2J\a"), monkeypatch) == 2
    assert capsys.readouterr().err == "mlvgm doctor: a server said \\x1b[2J\\x07\n"
