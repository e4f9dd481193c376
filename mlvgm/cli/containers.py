"""Images in files that hold many: tar and Parquet, to read from and to write to."""

import errno
import functools
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.errors import CliError
from mlvgm.cli.claim import claim, remove, was_claimed
from mlvgm.files import MAX_BYTES, SUFFIXES, Complain, replacing, shown

TAR, PARQUET = ".tar", ".parquet"
_ROWS = 256  # of a row group that is written: a few hundred images in memory


@dataclass(frozen=True)
class Member:
    """An image in a container; it is called CONTAINER/NAME.

    Attributes:
        load: reads its ``size`` bytes.
    """

    container: Path
    name: str
    size: int
    load: Callable[[], bytes]

    def __str__(self) -> str:
        return f"{self.container}/{self.name}"

    def read(self) -> bytes:
        """The image, encoded.

        Raises:
            OSError: it is too large, or cannot be read.
        """
        data = self.load() if self.size <= MAX_BYTES else None
        if data is None or len(data) > MAX_BYTES:  # a Parquet file tells no sizes
            raise OSError(errno.EFBIG, f"larger than {MAX_BYTES >> 20} MiB", str(self))
        return data


def is_container(path: Path) -> bool:
    """Whether ``path`` is named as a tar or a Parquet file."""
    return path.suffix.lower() in (TAR, PARQUET)


def members(path: Path, complain: Complain) -> Iterator[Member]:
    """The images in a tar file, those with the name of an image file, or in a Parquet file, one a row.

    A Parquet file has them in the column "image", as bytes, or as Hugging Face's datasets have them: as bytes and path.
    Their names are that path, or the column "file", or else the number of the row.

    Args:
        complain: called with what cannot be read, and why; the others follow.
    """
    for member in _in_tar(path, complain) if path.suffix.lower() == TAR else _in_parquet(path, complain):
        inside = Path(member.name)
        if inside.is_absolute() or ".." in inside.parts or "\0" in member.name or not inside.name:
            complain(Path(str(member)), "its name leads out of the output folder: rename it")
        else:
            yield member


def _in_tar(path: Path, complain: Complain) -> Iterator[Member]:
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115 -- stays open for `Member.load`
        for info in tar:
            if info.isreg() and info.name.lower().endswith(SUFFIXES):
                yield Member(path, info.name, info.size, functools.partial(_extract, tar, info))
        with path.open("rb") as file:  # tarfile says nothing of what is cut off between two members
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                complain(path, "cut off or damaged: only the images before that were read")
    except OSError as error:
        complain(path, str(error.strerror))
    except Exception:  # tarfile raises almost anything for damaged headers
        complain(path, "not an uncompressed tar file, or damaged")


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(info)
    assert stream is not None  # it is a regular file
    try:
        return stream.read()
    except OSError:
        raise
    except Exception as error:  # as above
        raise OSError(errno.EIO, f"damaged ({error})") from None


def _in_parquet(path: Path, complain: Complain) -> Iterator[Member]:
    _, parquet = _pyarrow()
    try:
        file = parquet.ParquetFile(path)
        if "image" not in file.schema_arrow.names:
            complain(path, f'no column "image" among {", ".join(file.schema_arrow.names)}')
            return
        named = "file" in file.schema_arrow.names

        @functools.lru_cache(maxsize=1)
        def images(group: int) -> Sequence[Any]:
            column = file.read_row_group(group, columns=["image"])["image"].to_pylist()
            return [value if isinstance(value, Mapping) else {"bytes": value} for value in column]

        def load(group: int, i: int) -> bytes:
            try:
                data = images(group)[i]["bytes"]
            except Exception as error:  # PyArrow raises almost anything for damaged files
                raise OSError(errno.EIO, f"holds no bytes ({error})") from None
            if not isinstance(data, bytes):
                raise OSError(errno.EIO, f"holds no bytes, but {type(data).__name__}")
            return data

        row = 0
        for group in range(file.num_row_groups):
            names = file.read_row_group(group, columns=["file"])["file"].to_pylist() if named else images(group)
            for i, name in enumerate(names):
                name = name.get("path") if isinstance(name, Mapping) else name
                yield Member(path, str(name or f"{row:08d}"), 0, functools.partial(load, group, i))
                row += 1
    except Exception as error:  # as above
        complain(path, f"not a Parquet file, or damaged: {str(error).partition(chr(10))[0]}")


def parts(out: Path, overwrite: bool) -> Path:
    """The folder for the PNGs of a job whose result is ``out``: itself, or one beside the container that it names.

    Raises:
        CliError: the container is there already. Then the folder is removed, in case the job was killed before it did.
    """
    if not is_container(out):
        return out
    folder = out.with_name(f"{out.name}.parts")
    if os.path.lexists(out) and not overwrite:
        if was_claimed(folder):
            with claim(folder):
                remove(folder)
        raise CliError(f"{shown(out)} is there, so its job is done: choose another --out, or --overwrite it")
    if out.suffix.lower() == PARQUET:
        _pyarrow()
    return folder


def pack(folder: Path, out: Path, rows: Mapping[str, str | None]) -> None:
    """Make the container ``out`` of the PNGs in ``folder``, and remove the folder. It is there whole, or not at all.

    Equal PNGs make equal containers: members are in the order of their names, without times or owners.

    Args:
        rows: by name of the PNG in ``folder`` None, and by name of a file what was wrong with it. A Parquet file has
            the columns file, image (the PNG, with its answer inside) and error.

    Raises:
        CliError: it cannot be written; the same command goes on from here.
    """
    try:
        with replacing(out) as draft:
            (_write_tar if out.suffix.lower() == TAR else _write_parquet)(folder, draft, sorted(rows.items()))
        remove(folder)
    except OSError as error:
        raise CliError(f"{shown(out)}: {error.strerror}; the same command goes on from here") from None


def _write_tar(folder: Path, draft: Path, rows: Sequence[tuple[str, str | None]]) -> None:
    with tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, error in rows:
            if error is None:
                info = tarfile.TarInfo(name)
                png = (folder / name).read_bytes()
                info.size = len(png)
                tar.addfile(info, io.BytesIO(png))


def _write_parquet(folder: Path, draft: Path, rows: Sequence[tuple[str, str | None]]) -> None:
    pyarrow, parquet = _pyarrow()
    schema = pyarrow.schema([("file", pyarrow.string()), ("image", pyarrow.binary()), ("error", pyarrow.string())])
    with parquet.ParquetWriter(draft, schema, compression="none") as writer:  # PNGs are compressed
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            pngs = [None if error else (folder / name).read_bytes() for name, error in some]
            columns = [[name for name, _ in some], pngs, [error for _, error in some]]
            writer.write_table(pyarrow.table(columns, schema))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise CliError("Parquet needs PyArrow: pip install '.[scale]'") from None
    return pyarrow, parquet
