"""Pixels of odd but right image files, through handlers.image.decode, against values known from how each was made.

    python tests/cases/image_decoding.py      (from the project's root)

The files are written here byte by byte, so no decoder decides what is right. JPEG is the exception: there, the file
with its end cut off must give what the whole one gives.
"""

import io
import os
import struct
import sys
import zlib

sys.path.insert(0, os.getcwd())

import numpy as np
from PIL import Image

from handlers.image import ImageError, decode

H, W = 32, 48
faults = 0


def check(name: str, data: bytes, wanted: np.ndarray | None, tolerance: int = 1) -> None:
    """``wanted`` are the pixels, uint8 (H, W, 3), or None where the file must be refused."""
    global faults
    try:
        got = decode(data, (H, W)).astype(int)
        distance = None if wanted is None else int(np.abs(got - wanted).max())
        good, words = distance is not None and distance <= tolerance, "decoded"
        if distance:
            row, column = np.argwhere(np.abs(got - wanted).max(axis=2) > tolerance)[0] if not good else (0, 0)
            words = f"{got[row, column].tolist()} for {wanted[row, column].tolist()} in row {row}, column {column}"
    except ImageError as error:
        good, words = wanted is None, f"refused: {error}"
    except Exception as error:
        good, words = False, f"{type(error).__name__}: {error}"
    faults += not good
    aim = "an ImageError" if wanted is None else "its pixels"
    print(f"ok    {name}" if good else f"FAULT {name}: wanted {aim}, got {words}", flush=True)


def png(depth: int, colour: int, rows: np.ndarray, **chunks: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, depth, colour, 0, 0, 0))
    extra = b"".join(chunk(kind.encode(), content) for kind, content in chunks.items())
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def packed(values: np.ndarray, depth: int) -> np.ndarray:
    """Gray values below 2 ** depth, several in a byte."""
    per, bytes_ = 8 // depth, np.zeros((H, W * depth // 8), np.uint8)
    for i in range(per):
        bytes_ |= (values[:, i::per] << (8 - depth * (i + 1))).astype(np.uint8)
    return bytes_


def bmp(alpha: np.ndarray | int, header: int, masks: bool) -> bytes:
    """32 bits a pixel: an INFO header of 40 bytes, or V4 of 108 with masks."""
    pixels = np.dstack([RGB[::-1, :, ::-1], np.broadcast_to(np.uint8(alpha), (H, W))[::-1]])
    info = struct.pack("<IiiHHIIiiII", header, W, H, 1, 32, 3 if masks else 0, pixels.size, 2835, 2835, 0, 0)
    if masks:
        info += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info += bytes(header - len(info))
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + pixels.size, 0, 0, 14 + len(info)) + info + pixels.tobytes()


def jpeg(**how: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, "JPEG", quality=95, **how)
    return stream.getvalue()


def exif(order: str, turn: int, kind: str = "SHORT") -> bytes:
    """An APP1 segment with an orientation."""
    number, layout = {"SHORT": (3, "HH"), "LONG": (4, "I"), "BYTE": (1, "BBH")}[kind]
    tiff = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIHHHI", 42, 8, 1, 0x112, number, 1)
    tiff += struct.pack(order + layout, turn, *[0] * (len(layout) - 1)) + bytes(4)
    return b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff


y, x = np.mgrid[0:H, 0:W]
RGB = np.dstack([x * 255 // (W - 1), y * 255 // (H - 1), np.full_like(x, 128)]).astype(np.uint8)
GRAY = RGB.mean(axis=2).astype(np.uint8)
GRAY[:10, :14] = 77
RAMP = np.tile(np.linspace(0, 255, W).astype(np.uint8), (H, 1))


def on_white(values: np.ndarray, clear: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(clear, 255, values)[..., None], 3, axis=2).astype(int)


# Gray with one transparent value, which is to be white: every depth that the format knows.
check("control: gray of 8 bits", png(8, 0, GRAY), on_white(GRAY, GRAY < 0))
check(
    "control: gray of 8 bits, one value transparent",
    png(8, 0, GRAY, tRNS=struct.pack(">H", 77)),
    on_white(GRAY, GRAY == 77),
)
wide = GRAY.astype(np.uint16) * 257
check("control: gray of 16 bits", png(16, 0, wide.astype(">u2")), on_white(GRAY, GRAY < 0))
check(
    "gray of 16 bits, one value transparent",
    png(16, 0, wide.astype(">u2"), tRNS=struct.pack(">H", 77 * 257)),
    on_white(GRAY, GRAY == 77),
)
near = np.where(GRAY == 77, wide, wide + 3).astype(
    ">u2"
)  # no other pixel has the value, though some have its upper byte
check(
    "control: gray of 16 bits, neighbours of the transparent value stay",
    png(16, 0, near, tRNS=struct.pack(">H", 77 * 257 + 1)),
    on_white(GRAY, GRAY < 0),
)
one, two = GRAY > 100, GRAY >> 6
check(
    "control: gray of 1 bit, black transparent",
    png(1, 0, packed(one, 1), tRNS=struct.pack(">H", 0)),
    on_white(one * 255, ~one),
)
check("control: gray of 2 bits", png(2, 0, packed(two, 2)), on_white(two * 85, two < 0))
check(
    "gray of 2 bits, one value transparent",
    png(2, 0, packed(two, 2), tRNS=struct.pack(">H", 1)),
    on_white(two * 85, two == 1),
)
corner = RGB.astype(int)
corner[0, 0] = 255
check("control: RGB, one colour transparent", png(8, 2, RGB, tRNS=struct.pack(">HHH", 0, 0, 128)), corner)

two_deep = (GRAY >> 4).astype(np.uint8)
check(
    "gray of 4 bits, one value transparent",
    png(4, 0, packed(two_deep, 4), tRNS=struct.pack(">H", 4)),
    on_white(two_deep * 17, two_deep == 4),
)
check(
    "gray of 2 bits, bits of the value that the image has not do not count",
    png(2, 0, packed(two, 2), tRNS=struct.pack(">H", 0xFF01)),
    on_white(two * 85, two == 1),
)
wide_rgb = (RGB.astype(np.uint16) * 257).astype(">u2").reshape(H, -1)
check("RGB of 16 bits, one colour transparent", png(16, 2, wide_rgb, tRNS=struct.pack(">HHH", 0, 0, 128 * 257)), corner)
check(
    "RGB of 16 bits, neighbours of the transparent colour stay",
    png(16, 2, wide_rgb, tRNS=struct.pack(">HHH", 0, 0, 128 * 257 + 1)),
    RGB.astype(int),
)

# 32-bit BMP. Where no pixel has any alpha the byte was left empty: Windows and browsers show such files opaque.
blended = np.rint(255 + (RGB.astype(float) - 255) * (RAMP[..., None] / 255)).astype(int)
check("control: BMP of 32 bits, no alpha mask", bmp(0, 40, masks=False), RGB.astype(int))
check("control: BMP V4 with alpha", bmp(RAMP, 108, masks=True), blended, tolerance=2)
check("control: BMP V4, opaque", bmp(255, 108, masks=True), RGB.astype(int))
check("BMP V4 with an alpha mask, alpha 0 everywhere", bmp(0, 108, masks=True), RGB.astype(int))

# JPEG
whole = jpeg()
pixels = np.asarray(Image.open(io.BytesIO(whole))).astype(int)
check("control: JPEG", whole, pixels)
check("control: JPEG, bytes behind its end", whole + bytes(600), pixels)
check("JPEG without its end marker, as small cameras send it", whole[:-2], pixels)
check("control: JPEG cut in the middle", whole[: len(whole) // 2], None)
for name, how in {"progressive": {"progressive": True}, "restart markers": {"restart_marker_blocks": 3}}.items():
    other = jpeg(**how)
    check(f"JPEG without its end marker, {name}", other[:-2], np.asarray(Image.open(io.BytesIO(other))).astype(int))
    for scan in range(other.count(b"\xff\xda") - 1):  # between scans nothing says that more will come
        check(f"JPEG cut behind scan {scan}", b"\xff\xda".join(other.split(b"\xff\xda")[: scan + 2]), None)
turned = np.asarray(Image.fromarray(pixels.astype(np.uint8)).transpose(Image.Transpose.ROTATE_180)).astype(int)
for order, name in (("<", "little"), (">", "big")):
    for kind in ("SHORT", "LONG", "BYTE"):
        check(
            f"control: EXIF orientation 3, {name}-endian {kind}", whole[:2] + exif(order, 3, kind) + whole[2:], turned
        )

sys.exit(1 if faults else 0)
