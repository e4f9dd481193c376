"""Remove metadata from encoded images, and estimate the cost of decoding them.

Profiles, texts, comments, thumbnails and second pictures are not used, only the EXIF block for its orientation.
Decoders spend unbounded time and memory on them: 5 MB of profiles in a PNG of 8 x 8 pixels took Pillow 11 seconds. Nor
does the size of a JPEG bound its cost: each scan visits every block again.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from handlers.errors import MlvgmError

MAX_PARTS = 10_000
"""Largest number of parts of an image; a PNG of 6 MB has about 800 chunks, a photograph a few hundred segments."""

_TOO_MANY = f"the image has more than {MAX_PARTS} parts (chunks, segments): save it anew"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"IDAT", b"IEND")
_PNG_BEFORE_PIXELS = (b"tRNS", b"acTL", b"fcTL")  # which mean nothing, or something else, behind them
_GRAY, _RGB, _PALETTE = 0, 2, 3
_CHANNELS = {_GRAY: 1, _RGB: 3, _PALETTE: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
"""Passes of an interlaced PNG: first column, step, first row, step."""
_JPEG_START = b"\xff\xd8\xff"
_WEBP_START = b"RIFF"
# Searched for, since any number of fill bytes may precede it; restart markers belong to the data of a scan, and 0x01,
# like them, has no length: decoders skip it, and see the marker behind it.
_JPEG_MARKER = re.compile(rb"\xff([^\xff\x00\x01\xd0-\xd7])")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_SCAN, _END, _TABLES = 0xDA, 0xD9, 0xDB
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # the last is that of JPEG-LS
_JFIF, _EXIF, _ADOBE, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
_EXIF_START = b"Exif\0\0"
_MOST_TABLES = 2 + 4 * 129  # bytes: a decoder has room for four


class ImageError(MlvgmError, ValueError):
    """An image is refused; the message is ASCII, and is sent to the client."""


class DamagedError(ImageError):
    """The bytes of an image violate its format."""

    def __init__(self) -> None:
        super().__init__("the image is truncated or damaged")


class JpegScans:
    """The frame of a JPEG, and the cost of its scans.

    Attributes:
        at_once: there is one scan, so a decoder keeps only a few rows; otherwise it keeps a number for every sample.
        lossless: the JPEG cannot be decoded at a reduced size.
        count: number of scans.
        samples: number of samples of all components in all scans together.

    Args:
        kind: marker of the start of frame.
        content: the bytes after its length.

    Raises:
        ImageError: this kind of JPEG is not read.
        DamagedError: the frame is malformed.
    """

    def __init__(self, kind: int, content: bytes) -> None:
        if len(content) < 9 or len(content) != 6 + 3 * content[5]:
            raise DamagedError
        bits, height, width = struct.unpack_from(">BHH", content)
        if bits != 8 or kind & 7 > 3:
            raise ImageError("a JPEG of 12 bits, or a hierarchical one, is not read: save it as an ordinary JPEG")
        sampling = {content[i]: (content[i + 1] >> 4, content[i + 1] & 15) for i in range(6, len(content), 3)}
        if not height or not width or len(sampling) < content[5]:
            raise DamagedError
        if not all(1 <= side <= 4 for sides in sampling.values() for side in sides):
            raise DamagedError
        across, down = (8 * max(sides) for sides in zip(*sampling.values(), strict=True))
        units = -(-width // across) * -(-height // down)
        self._blocks = {name: units * wide * high for name, (wide, high) in sampling.items()}
        self._missing = {name: [16] * 64 for name in sampling}
        self._progressive, self._huffman = kind & 3 == 2, kind < 0xC8
        self.lossless = kind & 3 == 3
        self.at_once, self.count, self.samples = kind & 3 < 2, 0, 0

    def add(self, content: bytes, size: int) -> None:
        """Add a scan: the header of its start, after the length, and the number of bytes of its data.

        Raises:
            DamagedError: the header is malformed, or the data is too short for its blocks.
        """
        if not content or len(content) != 4 + 2 * content[0]:
            raise DamagedError
        names = content[1:-3:2]
        first, last, bits = content[-3:] if self._progressive else (0, 63, 0)
        if not self._blocks.keys() >= set(names) or not first <= last <= 63:
            raise DamagedError
        blocks = sum(self._blocks[name] for name in names)
        if self._huffman and first == 0 and bits < 16 and blocks > 8 * size:
            raise DamagedError  # the first scan needs at least one bit per block
        self.at_once &= len(names) == len(self._blocks)
        self.count += 1
        self.samples += 64 * blocks
        for name in names:
            self._missing[name][first : last + 1] = [bits & 15] * (last + 1 - first)

    def complete(self, data: bytes) -> bool:
        """Whether the scans of ``data`` have all bits of every coefficient, according to their headers."""
        # An arithmetic decoder takes zeros for what is missing, and an encoder leaves them out at the end.
        unsure = not self._huffman or (self._progressive and _RESTART.search(data))
        return not unsure and not any(map(any, self._missing.values()))


@dataclass(frozen=True)
class Stripped:
    """An image without metadata.

    Attributes:
        data: the encoded image.
        exif: its EXIF block, or empty.
        transparent: the one transparent colour of a gray or RGB PNG, left out of ``data``: a gray value,
            three of RGB in 8 bits, or the upper bytes of three in 16 and then the lower ones.
        scans: of a JPEG.
        lossless: a WebP with lossless pixels or opacity.
        ended: False for a JPEG without its end marker.
    """

    data: bytes
    exif: bytes = b""
    transparent: tuple[int, ...] = ()
    scans: JpegScans | None = None
    ended: bool = True
    lossless: bool = False


def strip_metadata(data: bytes) -> Stripped:
    """``data`` without metadata; WebP and BMP are not changed.

    Raises:
        ImageError: it is truncated, damaged, has more than `MAX_PARTS` parts, or is a kind of JPEG that is not read.
    """
    if data.startswith(_PNG_START):
        return _png(data)
    if data.startswith(_WEBP_START):
        return _webp(data)
    return _jpeg(data) if data.startswith(_JPEG_START) else Stripped(data)


def has_all_rows(png: bytes) -> bool:
    """Whether the pixel data of a PNG is not shorter than its header says: decoders leave missing rows black.

    Args:
        png: an image that has been decoded, without metadata.
    """
    width, height, depth, colour, interlaced = struct.unpack_from(">IIBB2xB", png, 16)
    missing = 0
    for left, across, top, down in _ADAM7 if interlaced else ((0, 1, 0, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        missing += rows * (1 + (columns * depth * _CHANNELS[colour] + 7) // 8) if columns > 0 else 0
    unpacker = zlib.decompressobj()
    packed = b"".join(png[start:end] for kind, start, end in _chunks(png) if kind == b"IDAT")
    while missing > 0 and (rows_of_pass := unpacker.decompress(packed, 1 << 20)):
        missing -= len(rows_of_pass)
        packed = unpacker.unconsumed_tail
    return missing <= 0


def _chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each chunk, and where its content starts and ends."""
    place = len(_PNG_START)
    while place + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        yield kind, place + 8, place + 8 + length
        place += 12 + length


def _png(data: bytes) -> Stripped:
    kept, exif, transparent, has_pixels = [_PNG_START], b"", b"", False
    depth, colour = data[24:26] if data[12:16] == b"IHDR" and len(data) > 33 else (0, 0)
    for count, (kind, start, end) in enumerate(_chunks(data), 1):
        if count > MAX_PARTS:
            raise ImageError(_TOO_MANY)
        has_pixels |= kind == b"IDAT"
        if has_pixels and kind in _PNG_BEFORE_PIXELS:
            continue
        if kind == b"tRNS" and colour != _PALETTE:
            transparent = data[start:end]
        elif kind in _PNG_KEPT:
            kept.append(data[start - 8 : end + 4])
        elif kind == b"eXIf":
            exif = data[start:end]
        if kind == b"IEND":
            return Stripped(b"".join(kept), exif, _transparent_colour(transparent, depth, colour))
    raise DamagedError


def _webp(data: bytes) -> Stripped:
    place = 12
    for _ in range(MAX_PARTS):
        kind, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if kind in (b"VP8 ", b"VP8L", b"ALPH", b""):
            return Stripped(data, lossless=kind in (b"VP8L", b"ALPH"))
        place += 24 if kind == b"ANMF" else 8 + length + length % 2  # a frame holds parts itself
    raise ImageError(_TOO_MANY)


def _transparent_colour(content: bytes, depth: int, colour: int) -> tuple[int, ...]:
    """The colour in a tRNS chunk, in the values that the decoder returns."""
    if not content or colour not in (_GRAY, _RGB):
        return ()
    # Each sample takes two bytes, of which only as many bits count as the image has.
    values = [value % 2**depth for value in struct.unpack_from(">H" if colour == _GRAY else ">HHH", content)]
    if depth < 8:  # gray, spread over 0 to 255
        return (values[0] * 255 // (2**depth - 1),)
    if colour == _GRAY or depth == 8:
        return tuple(values)
    return tuple(v >> 8 for v in values) + tuple(v & 255 for v in values)


def _jpeg(data: bytes) -> Stripped:
    kept, exif, scans, ended = [data[:2]], b"", None, False
    place, first_scan, end = 2, 0, len(data)
    for _ in range(MAX_PARTS):
        marker = _JPEG_MARKER.search(data, place)
        if marker is None:
            break
        kind, start = marker[1][0], marker.end()
        if kind == _END:
            ended, end = True, start
            break
        place = start + max(2, int.from_bytes(data[start : start + 2], "big"))
        content = data[start + 2 : place]
        if kind in _FRAMES:
            if scans is not None:
                raise DamagedError
            scans = JpegScans(kind, content)
        elif kind == _SCAN:
            if scans is None:
                raise DamagedError
            following = _JPEG_MARKER.search(data, place)
            scans.add(content, (following.start() if following else end) - place)
            first_scan = first_scan or start - 2
        elif kind == _TABLES and len(content) > _MOST_TABLES:
            raise DamagedError
        if first_scan:
            continue  # of what follows the first scan, everything is kept, and other decoders do not read an EXIF block
        if kind == _EXIF and content.startswith(_EXIF_START):
            exif = exif or content[len(_EXIF_START) :]
        elif kind in (_JFIF, _ADOBE) or not (0xE0 <= kind <= 0xEF or kind == _COMMENT):
            kept.append(data[start - 2 : place])
    else:
        raise ImageError(_TOO_MANY)
    if scans is None or not first_scan:
        raise DamagedError
    return Stripped(b"".join(kept) + data[first_scan:end], exif, (), scans, ended)
