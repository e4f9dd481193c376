"""``mlvgm predict --url``: a server elsewhere, behind https and a key; tests/deploy/test_serving.py asks a real one."""

import json
from pathlib import Path

import pytest

from mlvgm.cli.main import main
from tests.handlers.fake_server import ANSWER, FakeServer


@pytest.fixture
def words(https_server: tuple[FakeServer, Path], tmp_path: Path) -> list[str]:
    """All that says which server is asked, and how."""
    server, certificate = https_server
    (tmp_path / "key.txt").write_text("secret\n")
    return [
        *["--url", f"https://localhost:{server.server_port}", "--model", "m"],
        *["--api-key-file", str(tmp_path / "key.txt"), "--ca-file", str(certificate)],
    ]


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    for name, content in {"a.png": b"image", "b/a.JPG": b"image", "b/notes.txt": b"no", "c.png": b"bad"}.items():
        (tmp_path / "signs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "signs" / name).write_bytes(content)
    return tmp_path / "signs"


def test_folders_and_files_over_https(
    words: list[str], signs: Path, https_server: tuple[FakeServer, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(signs), *words, "--samples", "4", "--json"]) == 1
    rows = {row["file"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(rows) == {str(signs / "a.png"), str(signs / "b/a.JPG"), str(signs / "c.png")}
    assert rows[str(signs / "a.png")]["label"] == "stop"
    assert "truncated" in rows[str(signs / "c.png")]["error"]
    server, _ = https_server
    assert {headers["X-Api-Key"] for _, headers, _ in server.asked} == {"secret"}
    assert {headers["X-Mlvgm-Samples"] for _, headers, _ in server.asked} == {"4"}
    assert len(server.callers) == 1, "all over one connection"


def test_purified_images_keep_their_places(
    words: list[str], signs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (signs / "c.png").unlink()
    assert main(["predict", str(signs), *words, "--save-purified", str(tmp_path / "out")]) == 0
    saved = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert saved == ["a.purified.png", "b/a.purified.png"]
    assert main(["predict", str(signs / "a.png"), str(signs / "b"), *words, "--save-purified", str(tmp_path)]) == 2
    assert "two of the files would be saved as" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--api-key-file": "wrong.txt"}, "answered 401: X-Api-Key is missing or unknown"),
        ({"--api-key-file": "two.txt"}, "api_key must be printable ASCII"),
        ({"--api-key-file": "none.txt"}, "none.txt"),
        ({"--api-key-file": "/dev/null"}, "not a regular file"),
        ({"--ca-file": "wrong.txt"}, "holds no certificate"),
        ({"--ca-file": None}, "--ca-file"),
        ({"--model": None}, "say which model with --model"),
        ({"--url": None}, "name it with --url"),
        ({"--url": "ftp://x"}, "not the http:// or https:// address"),
        ({"--url": "https://127.0.0.1:9"}, "no server there"),
        ({"--alphas": "ä"}, "alphas must be printable ASCII"),
    ],
)
def test_what_cannot_work_is_one_line(
    words: list[str],
    signs: Path,
    tmp_path: Path,
    change: dict[str, str | None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLVGM_STATE", str(tmp_path))
    (tmp_path / "wrong.txt").write_text("wrong")
    (tmp_path / "two.txt").write_bytes(b"one\ntwo\xff")
    options = {**dict(zip(words[::2], words[1::2], strict=True)), **change}
    given = [word for pair in options.items() if pair[1] is not None for word in pair]
    assert main(["predict", str(signs), *map(str, given), "--json"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_empty_folder(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(tmp_path / "empty"), *words]) == 2
    assert "no image to ask about" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {}, b"{}"), "not of this server"),
        ((200, {}, json.dumps(ANSWER | {"unpurified": 1}).encode()), "not of this server"),
        ((200, {}, json.dumps(ANSWER | {"confidence": "high"}).encode()), "not of this server"),
        ((200, {}, json.dumps(ANSWER | {"top_k": [1, 2]}).encode()), "not of this server"),
        ((200, {}, json.dumps(ANSWER | {"label": "\033[2J"}).encode()), r"\x1b[2J"),
        ((400, {}, json.dumps({"error": "\033[2J\a\nno"}).encode()), r"\x1b[2J\x07\nno"),
        ((401, {}, b"\033[2J"), r"\x1b[2J"),
    ],
)
def test_nothing_that_a_server_says_reaches_the_terminal_as_it_is(
    answer: tuple[int, dict[str, str], bytes],
    said: str,
    words: list[str],
    signs: Path,
    https_server: tuple[FakeServer, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, _ = https_server
    server.first = [answer]
    assert main(["predict", str(signs / "a.png"), *words]) < 3
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
    assert "\033" not in captured.out + captured.err
