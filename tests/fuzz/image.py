"""Coverage-guided fuzzing of the image decoder (`make fuzz`): whatever the bytes, pixels or an `ImageError`.

What fails is kept in build/fuzz until the next run.

Pillow itself is not instrumented: the Python above its decoders is, and libraries below them have fuzzers of their own.
"""

import io
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["handlers", "PIL"]):
    from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

    from handlers.image import ImageError, decode

from tests.fuzz import growth

SIZE = (8, 8)


def seeds() -> list[bytes]:
    """Small pictures of every format and mode."""
    gradient = Image.fromarray(np.indices((12, 12)).sum(axis=0).astype(np.uint8) * 11)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = []
    for format, modes in {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "WEBP": ("RGB", "RGBA"),
        "BMP": ("1", "L", "P", "RGB"),
    }.items():
        for mode in modes:
            stream = io.BytesIO()
            (gradient if mode == "I;16" else gradient.convert(mode)).save(stream, format, exif=exif)
            made.append(stream.getvalue())
    stream = io.BytesIO()
    gradient.save(stream, "JPEG", progressive=True)
    return [*made, stream.getvalue()]


def check(data: bytes) -> None:
    try:
        pixels = decode(data, SIZE)
    except ImageError as error:
        message = str(error)
        assert message.isascii()
        assert 0 < len(message) < 200
        return
    assert pixels.shape == (*SIZE, 3)
    assert pixels.dtype == np.uint8


def fuzz(
    check: Callable[[bytes], None], seeds: list[bytes], line: list[str], words: Sequence[str] = (), **limits: int
) -> None:
    """Call ``check`` with ever new bytes, until time is up or it fails.

    Args:
        line: the command line: options of libFuzzer, behind the name of the program.
        words: worth trying anywhere.
        limits: more of them, unless the command line says otherwise.
    """
    folder = Path("build") / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "corpus").mkdir(parents=True)
    for i, seed in enumerate(seeds):
        (folder / "corpus" / f"seed-{i}").write_bytes(seed)
    (folder / "words").write_text("".join(f'"{word}"\n' for word in (*words, "a")))  # an empty file is an error
    options = [f"-{name}={value}" for name, value in limits.items()]
    options += [f"-dict={folder / 'words'}", f"-artifact_prefix={folder}/"]
    atheris.Setup([line[0], *options, *line[1:], str(folder / "corpus")], check)
    atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    # An input that takes longer than 20 s or 2 GB is a finding too.
    odd = [make(100) for make in growth.IMAGES.values()]
    fuzz(check, [*seeds(), *odd], sys.argv, max_len=4096, timeout=20, rss_limit_mb=2048)
