"""An encoded image without what travels beside its pixels: profiles, texts, comments, thumbnails, a second picture.

Nothing of that is used here, but for the EXIF block with its orientation, and decoders spend time and memory on it that
have no bound: 5 MB of profiles in a PNG of 8 x 8 pixels took Pillow 11 seconds.
"""

import re
import struct

from handlers.errors import MlvgmError

MAX_PARTS = 10_000
"""Of one image; a PNG of 6 MB has about 800 chunks, a photograph with maps and profiles a few hundred segments."""

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"acTL", b"IDAT", b"IEND")
_JPEG_START = b"\xff\xd8\xff"
_JPEG_MARKER = re.compile(rb"\xff([^\xff\x00])")  # found by search: any number of fill bytes may stand before it
_SCAN, _END = 0xDA, b"\xff\xd9"
_JFIF, _EXIF, _ADOBE, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
_EXIF_START = b"Exif\0\0"


class DamagedError(MlvgmError, ValueError):
    """The parts of the image do not follow each other as its format wants it, or are too many."""


def essentials(data: bytes) -> tuple[bytes, bytes]:
    """``data`` with only what decides its pixels, and its EXIF block; other formats than PNG and JPEG stay as they are.

    Raises:
        DamagedError: truncated, damaged, or in more than `MAX_PARTS` parts.
    """
    if data.startswith(_PNG_START):
        return _png(data)
    return _jpeg(data) if data.startswith(_JPEG_START) else (data, b"")


def _png(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, place = [_PNG_START], b"", len(_PNG_START)
    for _ in range(MAX_PARTS):
        if place + 12 > len(data):
            raise DamagedError("a chunk is cut off")
        length, kind = struct.unpack_from(">I4s", data, place)
        content, end = place + 8, place + 12 + length
        if kind in _PNG_KEPT:
            kept.append(data[place:end])
        elif kind == b"eXIf":
            exif = data[content : content + length]
        if kind == b"IEND":
            return b"".join(kept), exif
        place = end
    raise DamagedError("too many chunks")


def _jpeg(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, place = [data[:2]], b"", 2
    for _ in range(MAX_PARTS):
        marker = _JPEG_MARKER.search(data, place)
        if marker is None:
            raise DamagedError("no scan")
        kind, start = marker[1][0], marker.end()
        if kind == _SCAN:
            end = data.find(_END, start)
            return b"".join((*kept, data[start - 2 : len(data) if end < 0 else end + 2])), exif
        place = start + int.from_bytes(data[start : start + 2], "big")
        if kind == _EXIF and data.startswith(_EXIF_START, start + 2):
            exif = exif or data[start + 2 + len(_EXIF_START) : place]
        elif kind in (_JFIF, _ADOBE) or not (0xE0 <= kind <= 0xEF or kind == _COMMENT):
            kept.append(data[start - 2 : place])
    raise DamagedError("too many segments")
