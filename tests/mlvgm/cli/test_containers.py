"""Bulk jobs from and to tar and Parquet files: the same images and seed give the same bytes wherever they lie."""

import contextlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from deploy.errors import CliError
from mlvgm.cli import containers
from mlvgm.cli.claim import claim
from mlvgm.cli.main import main
from tests import bundles
from tests.machine import killed

NAMES = ("a.png", "deeper/b.png", "c.png", "d.png", "e.png")


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(bundles.images(1, seed=number)[0]).save(stream, "PNG")
    return stream.getvalue()


def in_folder(path: Path, images: dict[str, bytes]) -> Path:
    for name, data in images.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def in_tar(path: Path, images: dict[str, bytes]) -> Path:
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        for name, data in images.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.with_suffix(".tar")


def in_parquet(path: Path, images: dict[str, bytes], nested: bool = False) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="needs PyArrow: pip install '.[scale]'")
    from pyarrow import parquet

    columns: dict[str, Any] = {"file": list(images), "image": list(images.values())}
    if nested:
        columns = {"image": [{"bytes": data, "path": name} for name, data in images.items()]}
    parquet.write_table(pyarrow.table(columns), path.with_suffix(".parquet"), row_group_size=2)
    return path.with_suffix(".parquet")


def in_dataset(path: Path, images: dict[str, bytes]) -> Path:
    return in_parquet(path, images, nested=True)


IMAGES = {name: encoded(i) for i, name in enumerate(NAMES)}
FORMS: list[Callable[[Path, dict[str, bytes]], Path]] = [in_folder, in_tar, in_parquet, in_dataset]


def purify(given: Path, out: Path, bundle: Path, *options: str) -> int:
    words = ["purify", str(given), "--bundle", str(bundle), "--out", str(out), "--runtime", "onnxruntime"]
    return main([*words, "--samples", "2", "--seed", "7", *options])


def content(out: Path) -> dict[str, bytes]:
    """What came out, by name."""
    if out.suffix == ".tar":
        with tarfile.open(out) as tar:
            return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    if out.suffix == ".parquet":
        from pyarrow import parquet

        rows = parquet.read_table(out).to_pylist()
        return {row["file"]: row["image"] for row in rows if row["image"]}
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.png")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["", ".tar", ".parquet"])
def test_whatever_they_lie_in(form: Any, ending: str, nvae_bundle: Path, tmp_path: Path) -> None:
    if ending == ".parquet":
        pytest.importorskip("pyarrow", reason="needs PyArrow: pip install '.[scale]'")
    out = tmp_path / f"out{ending}"
    assert purify(form(tmp_path / "in", IMAGES), out, nvae_bundle) == 0
    assert purify(in_folder(tmp_path / "plain", IMAGES), tmp_path / "expected", nvae_bundle) == 0
    assert content(out) == content(tmp_path / "expected")
    assert set(content(out)) == set(NAMES)
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("ending", [".tar", ".parquet"])
def test_work_that_was_cut_off_goes_on(
    ending: str, nvae_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if ending == ".parquet":
        pytest.importorskip("pyarrow", reason="needs PyArrow: pip install '.[scale]'")
    images = in_tar(tmp_path / "in", IMAGES | {"broken.png": b"no image"})
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"out{ending}"
    assert purify(images, whole, nvae_bundle, "--json") == 1
    answers = capsys.readouterr().out.replace(whole.name, out.name)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(containers.Path, "replace", full)
        assert purify(images, out, nvae_bundle) == 2
    assert not out.exists()
    (tmp_path / f"out{ending}.parts" / "c.png").unlink(missing_ok=True)
    capsys.readouterr()
    assert purify(images, out, nvae_bundle, "--json") == 1
    rows = sorted(map(json.loads, capsys.readouterr().out.splitlines()), key=str)
    assert rows == sorted(map(json.loads, answers.splitlines()), key=str)
    assert out.read_bytes() == whole.read_bytes()
    assert purify(images, out, nvae_bundle) == 2
    assert "its job is done" in capsys.readouterr().err


@pytest.mark.parametrize("form", [in_tar, in_parquet])
@pytest.mark.parametrize("name", ["/tmp/x.png", "../x.png", "a/../../x.png"])
def test_a_name_that_leads_out_is_refused(
    form: Any, name: str, nvae_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = form(tmp_path / "in", {"a.png": encoded(0), name: encoded(1)})
    assert purify(given, tmp_path / "out" / "deep", nvae_bundle) == 1
    assert "its name leads out" in capsys.readouterr().err
    assert set(content(tmp_path / "out" / "deep")) == {"a.png"}
    assert not (tmp_path / "out" / "x.png").exists()


@pytest.mark.parametrize("ending", [".tar", ".parquet"])
@pytest.mark.parametrize("damage", ["nothing", "text", "half", "missing"])
def test_a_damaged_container_is_named(
    ending: str, damage: str, nvae_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (in_tar if ending == ".tar" else in_parquet)(tmp_path / "in", IMAGES)
    whole = given.read_bytes()
    given.write_bytes({"nothing": b"", "text": b"hello " * 500, "half": whole[: len(whole) // 8]}.get(damage, b""))
    if damage == "missing":
        given.unlink()
    good = in_folder(tmp_path / "good", {"z.png": encoded(9)})
    words = ["purify", str(given), str(good), "--bundle", str(nvae_bundle), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert "z.png" in content(tmp_path / "out")
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert given.name in captured.err


@pytest.mark.parametrize("form", [in_tar, in_parquet])
def test_an_image_that_is_too_large_is_no_image(
    form: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = form(tmp_path / "images", {"small.png": b"x" * 10, "large.png": b"x" * 11})
    monkeypatch.setattr(containers, "MAX_BYTES", 10)
    small, large = containers.members(file, lambda path, reason: pytest.fail(f"{path}: {reason}"))
    assert small.read() == b"x" * 10
    with pytest.raises(OSError, match="larger than"):
        large.read()


@pytest.mark.parametrize("form", [in_tar, in_parquet, in_dataset])
def test_whatever_bytes_change_it_is_told_and_not_raised(
    form: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    file, random = form(tmp_path / "images", {"a.png": b"x" * 100, "d/b.png": b"y" * 700}), Random(0)
    content = file.read_bytes()
    for _ in range(200):
        changed = bytearray(content)
        for _ in range(3):
            changed[random.randrange(len(content))] = random.randrange(256)
        if form is in_tar:
            for start in (0, 1024):  # else the checksum hides what a header says
                header = changed[start : start + 148] + b" " * 8 + changed[start + 156 : start + 512]
                changed[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        file.write_bytes(changed)
        for member in containers.members(file, lambda path, reason: None):
            with contextlib.suppress(OSError):
                member.read()


PAX = [
    b"30 GNU.sparse.map=a,1,b,c,2,3\n",
    b"12 size=-55\n",
    b"99999999999 path=a\n",
    b"30 size=99999999999999999999999\n",
]


@pytest.mark.parametrize("pax", PAX)
def test_extended_headers_of_any_sense(pax: bytes, tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(pax)
    image = tarfile.TarInfo("a.png")
    image.size = 600
    file, told = tmp_path / "images.tar", []
    blocks = header.tobuf(tarfile.USTAR_FORMAT) + pax.ljust(512, b"\0") + image.tobuf(tarfile.USTAR_FORMAT)
    file.write_bytes(blocks + bytes(4096))
    for member in containers.members(file, lambda path, reason: told.append(reason)):
        with contextlib.suppress(OSError):
            member.read()


@pytest.mark.parametrize("values", [[10**15, 4], [True, False], ["text", "b"], [[1, 2], [3]]])
def test_a_column_of_something_else_holds_no_bytes(values: list[Any], tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs PyArrow: pip install '.[scale]'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": values}), tmp_path / "images.parquet")
    for member in containers.members(tmp_path / "images.parquet", lambda path, reason: pytest.fail(reason)):
        with pytest.raises(OSError, match="holds no bytes"):
            member.read()


def test_whatever_kills_it_and_when_the_container_is_whole_and_the_folder_goes(tmp_path: Path) -> None:
    """And the next job of this name removes what is left, whether it goes on or is refused."""
    calls, cut_off, expected = 0, True, b""

    def job(out: Path) -> None:
        folder = containers.parts(out, overwrite=False)
        with claim(folder):
            for name in NAMES[:2]:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(name.encode())
            containers.pack(folder, out, dict.fromkeys(NAMES[:2]))

    while cut_off:
        calls += 1
        out = tmp_path / str(calls) / "out.tar"
        out.parent.mkdir()
        cut_off = killed(lambda out=out: job(out), calls)  # type: ignore[misc]
        is_done = out.exists()
        with pytest.raises(CliError, match="its job is done") if is_done else contextlib.nullcontext():
            job(out)
        expected = expected or out.read_bytes()
        assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == {"out.tar": expected}
    assert calls > 10


def test_a_folder_that_is_not_a_jobs_or_at_work_is_left_alone(tmp_path: Path) -> None:
    out, folder = tmp_path / "out.tar", tmp_path / "out.tar.parts"
    out.touch()
    folder.mkdir()
    (folder / "own.png").touch()
    with pytest.raises(CliError, match="its job is done"):
        containers.parts(out, overwrite=False)
    with claim(folder), pytest.raises(CliError, match="another job"):
        containers.parts(out, overwrite=False)
    assert (folder / "own.png").exists()


def test_only_who_has_the_folder_packs_it(nvae_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two jobs that end at once would write the same container."""
    given, packed = in_tar(tmp_path / "in", {"a.png": encoded(0)}), []

    def pack(folder: Path, *_: Any) -> None:
        with pytest.raises(CliError, match="another job"), claim(folder):
            pass
        packed.append(folder)

    monkeypatch.setattr("mlvgm.cli.purify.pack", pack)
    assert purify(given, tmp_path / "out.tar", nvae_bundle) == 0
    assert packed == [tmp_path / "out.tar.parts"]
