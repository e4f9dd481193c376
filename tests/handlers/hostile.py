"""Images made to cost their reader time or memory, each within the 6.5 MB that a body may have."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
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


def webp_of_many_codes(side: int) -> bytes:
    """A lossless WebP with codes of their own for each block of 4x4 pixels, 65,536 at most: tables of 5 kB for each."""

    def field(value: int, bits: int) -> str:
        return f"{value:0{bits}b}"[::-1]

    order = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8)  # in which the lengths of the codes of lengths are written
    start = "0" + field(len(order) - 4, 4)
    green = start + "".join(field(length in (8, 18), 3) for length in order) + "0" + "0" * 256 + "1" + field(24 - 11, 7)
    red = start + "".join(field(length in (0, 8), 3) for length in order) + "0" + "1" * 256
    one_symbol = field(1, 4)
    blocks = (-(-side // 4)) ** 2
    bits = field(0x2F, 8) + 2 * field(side - 1, 14) + "0000"  # without alpha, of version 0
    bits += "00" + "1" + field(0, 3)  # no transform, no colour cache; then the image that names each block's codes
    bits += "0" + green + red + 3 * one_symbol
    bits += "".join(f"{i % 65536 & 255:08b}{i % 65536 >> 8:08b}" for i in range(blocks))
    bits += 5 * min(blocks, 65536) * one_symbol
    data = np.packbits(np.frombuffer(bits.encode(), np.uint8) - ord("0"), bitorder="little").tobytes() + bytes(8)
    data += bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + b"WEBPVP8L" + struct.pack("<I", len(data)) + data


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
    "WebP, 16 million pixels": lambda: encoded(Image.new("RGB", (SIDE, SIDE), (1, 2, 3)), "WEBP"),
    "WebP, 65,536 codes": lambda: webp_of_many_codes(1448),
    "WebP, 20,000 tags": lambda: encoded(Image.new("RGB", (8, 8)), "WEBP", exif=exif(20_000, 6_000_000)),
    "BMP, 3 million runs": lambda: rle_bmp(SIDE, SIDE, b"\1\0" * 3_200_000),
    "BMP, a million jumps": lambda: rle_bmp(16_000, 1024, b"\0\2\0\xff" * 1_000_000),
}
"""By name; what makes them is called for one at a time."""
