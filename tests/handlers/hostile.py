"""Images made to cost their reader time or memory, each within the 6.5 MB that a body may have."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

SIDE = 4096
"""16,777,216 pixels in a square: the most that are decoded in full."""


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int,
    height: int,
    colour: int,
    depth: int,
    rows: bytes,
    before: bytes = b"",
    after: bytes = b"",
    interlaced: bool = False,
) -> bytes:
    """A PNG by hand, with chunks ``before`` and ``after`` its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


def wide_png(colour: int, depth: int, channels: int, before: bytes = b"") -> bytes:
    """As many pixels as are taken, in a few kilobytes."""
    row = b"\0" + b"\x55" * (SIDE * channels * depth // 8)
    return png(SIDE, SIDE, colour, depth, row * SIDE, before)


def little_png(before: bytes = b"", after: bytes = b"") -> bytes:
    return png(8, 8, 2, 8, (b"\0" + bytes(24)) * 8, before, after)


def little_jpeg(before: bytes) -> bytes:
    data = encoded(Image.new("RGB", (8, 8)), "JPEG")
    return data[:2] + before + data[2:]


def scans(side: int, count: int) -> bytes:
    data = encoded(Image.new("RGB", (side, side), "teal"), "JPEG", progressive=True, subsampling=0)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (count - data.count(b"\xff\xda") + 1) + data[-2:]


def rle_bmp(width: int, height: int, content: bytes) -> bytes:
    offset = 54 + 1024
    header = struct.pack("<IHHI", offset + len(content), 0, 0, offset)
    header += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(content), 0, 0, 256, 0)
    return b"BM" + header + bytes(1024) + content


def exif(tags: int, values: int) -> bytes:
    """A block of many tags that all point at the same values."""
    entries = b"".join(struct.pack("<HHII", 0x2000 + i, 3, values // 2, 8) for i in range(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", tags) + entries + bytes(values)


def zipped(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


COSTLY: dict[str, Callable[[], bytes]] = {
    "PNG, RGBA": lambda: wide_png(6, 8, 4),
    "PNG, RGBA of 16 bits": lambda: wide_png(6, 16, 4),
    "PNG, gray of 16 bits": lambda: wide_png(0, 16, 1),
    "PNG, palette with alpha": lambda: wide_png(3, 8, 1, chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(99))),
    "PNG, half a million chunks": lambda: little_png(chunk(b"teXt", b"") * 540_000),
    "PNG, 5000 profiles of 1 MB": lambda: little_png(chunk(b"iCCP", b"a\0\0" + zipped(1_000_000)) * 5000),
    "PNG, a profile of 300 MB": lambda: little_png(chunk(b"iCCP", b"a\0\0" + zipped(300_000_000))),
    "PNG, 5000 texts of 1 MB": lambda: little_png(after=chunk(b"zTXt", b"a\0\0" + zipped(1_000_000)) * 5000),
    "PNG, a text of 300 MB": lambda: little_png(chunk(b"zTXt", b"a\0\0" + zipped(300_000_000))),
    "PNG, more pixels than it says": lambda: png(8, 8, 2, 8, bytes(300_000_000)),
    "PNG, 20,000 tags": lambda: little_png(chunk(b"eXIf", exif(20_000, 6_000_000))),
    "JPEG, 64 million pixels": lambda: encoded(Image.new("CMYK", (8000, 8000)), "JPEG"),
    "JPEG, 100 scans": lambda: scans(SIDE, 100),
    "JPEG, 1.6 million segments": lambda: little_jpeg(b"\xff\xe5\0\2" * 1_600_000),
    "JPEG, 6 MB of fill bytes": lambda: little_jpeg(b"\xff" * 6_000_000 + b"\0"),
    "WebP, RGBA": lambda: encoded(Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 4)), "WEBP", lossless=True),
    "WebP, 20,000 tags": lambda: encoded(Image.new("RGB", (8, 8)), "WEBP", exif=exif(20_000, 6_000_000)),
    "BMP, 3 million runs": lambda: rle_bmp(SIDE, SIDE, b"\1\0" * 3_200_000),
    "BMP, a million jumps": lambda: rle_bmp(16_000, 1024, b"\0\2\0\xff" * 1_000_000),
}
"""By name; what makes them is called for one at a time."""
