"""Image files that a verb was given, and where what becomes of them goes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.errors import CliError
from handlers.image import image_files


def with_targets(given: Sequence[Path], out: Path) -> Iterator[tuple[Path, Path]]:
    """Every image file and the PNG below ``out`` that it becomes; files of a folder keep their places in it.

    Raises:
        CliError: two files would become one, or a file itself would be overwritten.
    """
    taken: dict[Path, Path] = {}
    for path in given:
        for file in image_files(path) if path.is_dir() else [path]:
            target = (out / (file.relative_to(path) if path.is_dir() else file.name)).with_suffix(".png")
            if target in taken:
                raise CliError(f"{taken[target]} and {file} would both become {target}: take them one after the other")
            if target.resolve() == file.resolve():
                raise CliError(f"{file} would be overwritten: choose another --out")
            taken[target] = file
            yield file, target
