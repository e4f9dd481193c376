"""Options that verbs share: what cannot be is refused while the words are read, before anything is loaded."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.errors import CliError
from handlers.manifest import Manifest
from mlvgm.cli import options
from mlvgm.cli.main import main


def parser() -> options.Parser:
    made = options.Parser(prog="x")
    options.add_files(made)
    options.add_pipeline(made, required=True)
    options.add_request(made)
    options.add_models(made)
    options.add_report(made)
    return made


def test_what_is_left_out_is_up_to_the_bundle() -> None:
    args = parser().parse_args(["a.png", "b", "--bundle", "bundle"])
    assert args.files == [Path("a.png"), Path("b")]
    assert (args.bundle, args.runtime, args.threads) == (Path("bundle"), "auto", 0)
    assert options.request(args) == {"samples": None, "alphas": None}
    assert options.request(parser().parse_args(["a", "--bundle", "b", "--samples", "auto"]))["samples"] == "auto"


def test_a_pipeline_is_made_of_its_options(nvae_bundle: Path) -> None:
    words = ["a", "--bundle", str(nvae_bundle), "--runtime", "onnxruntime", "--threads", "1"]
    with options.load_pipeline(parser().parse_args(words)) as pipeline:
        assert (pipeline.runtime, pipeline.manifest.name) == ("onnxruntime", "tiny")


def test_a_bundle_of_a_recipe_that_is_not_built_in_asks_for_its_file(nvae_bundle: Path) -> None:
    manifest = replace(Manifest.read(nvae_bundle), source={"recipe": "my-signs"})
    with pytest.raises(CliError, match="made from the recipe my-signs: name its file with --recipe FILE"):
        options.read_recipe(parser().parse_args(["a", "--bundle", str(nvae_bundle)]), manifest)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", "0"], "--samples: must be a number from 1 on, or auto, not '0'"),
        (["--samples", "atuo"], "--samples: must be a number from 1 on, or auto"),
        (["--samples", "9" * 5000], "--samples: must be"),
        (["--threads", "-1"], "--threads: must be a whole number from 0 to 1024, not '-1'"),
        (["--threads", "1.5"], "--threads: must be a whole number"),
        (["--runtime", "openvno"], "--runtime: invalid choice: 'openvno'"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["a", "--bundle", "b", *words])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e999", "x", ""])
def test_a_number_is_above_0(text: str) -> None:
    assert options.number("1e-3") == 0.001
    with pytest.raises(options.argparse.ArgumentTypeError, match="must be a number above 0"):
        options.number(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["purify", "FILE", "--bundle", "BUNDLE", "--samples", "1000"], "samples must be a whole number from 1 to 16"),
        (["purify", "FILE", "--bundle", "BUNDLE", "--alphas", "nosuch"], "alphas"),
        (["purify", "FILE", "--bundle", "NONE"], "not a bundle"),
        (["archive", "BUNDLE", "--batch-delay", "0"], "batch_delay_ms is 0, must be a whole number from 1"),
        (["archive", "BUNDLE", "--queue", "-4"], "queue is -4, must be a whole number from 0"),
        (["archive", "NONE"], "not a bundle"),
        (["export", "--recipe", "road-sign"], "did you mean 'road-signs'?"),
        (["export", "--recipe", "road-signs", "--input-noise", "-3"], "input_noise_l2 is -3.0, must be a number, 0 or"),
        (["export", "--recipe", "road-signs", "--input-noise", "nan"], "input_noise_l2 is nan, must be a number"),
        (["export", "--recipe", "FOLDER.yaml"], "is a folder"),
        (["verify", "BUNDLE"], "name it with --recipe"),
        (["verify", "BUNDLE", "--recipe", "road-signs"], "was not made from the recipe road-signs"),
    ],
)
def test_no_slip_ends_in_a_traceback(
    words: list[str], said: str, nvae_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FOLDER.yaml").mkdir()
    (tmp_path / "FILE").write_bytes(b"")
    places = {"BUNDLE": nvae_bundle, **{name: tmp_path / name for name in ("FILE", "NONE", "FOLDER.yaml")}}
    words = [str(places.get(word, word)) for word in words]
    if words[0] in ("purify", "archive"):
        words += ["--out", str(tmp_path / "out")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mlvgm {words[0]}: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["", "file/report.json", "locked/report.json"])
@pytest.mark.parametrize(
    "verb",
    [
        ["verify", "bundle", "--json"],
        ["evaluate", "bundle", "--images", "x", "--json"],
        ["tune", "--data", "x", "--out"],
        ["attack", "x.png", "--picture"],
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    verb: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode))
    with pytest.raises(SystemExit) as ended:
        main([*verb, str(tmp_path / name)])
    assert ended.value.code == 2
    assert "cannot be written" in capsys.readouterr().err.splitlines()[-1]


def test_a_report_may_be_new_in_new_folders_or_take_the_place_of_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "old.json").touch()
    for file in ("old.json", "new.json", "a/b/new.json"):
        assert options.report_file(str(tmp_path / file)) == tmp_path / file
    assert options.report_file("/dev/null") == Path("/dev/null")
