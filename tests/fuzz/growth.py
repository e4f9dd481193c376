"""Requests and images of any size, each of one kind of which there may be ever more: what they cost must grow no faster
than they do. The fuzzers start from small ones.
"""

import base64
import gzip
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

from tests.handlers import forms
from tests.handlers.hostile import chunk, encoded, exif, little_jpeg, little_png, png, rle_bmp, scans

JSON = {"Content-Type": "application/json"}
FORM = {"X-Form-Type": forms.TYPE}
DOTS = base64.b64encode(b"\x89PNG").decode()


def names(size: int) -> str:
    return ",".join(f'"{i:x}":0' for i in range(size // 9))


def tensor(**entries: Any) -> str:
    return json.dumps({"inputs": [{"name": "image", **entries}]}, separators=(",", ":"))


def pixels(datatype: str, number: str) -> Callable[[int], bytes]:
    def made(size: int) -> bytes:
        rows = max(1, size // (3 * 1000 * (len(number) + 1)))
        data = ",".join([number] * (rows * 3000))
        return (
            tensor(datatype=datatype, shape=[1, rows, 1000, 3], data=0).replace('"data":0', f'"data":[{data}]').encode()
        )

    return made


def nested_pixels(size: int) -> bytes:
    side = max(1, int((size / 9) ** 0.5))
    return tensor(datatype="UINT8", shape=[1, side, side, 3], data=[[[[0, 9, 99]] * side] * side]).encode()


def behind(head: str, content: bytes) -> tuple[bytes, dict[str, str]]:
    return head.encode() + content, {"Inference-Header-Content-Length": str(len(head))}


def lengths(size: int) -> tuple[bytes, dict[str, str]]:
    content = bytes(size // 4 * 4)
    head = tensor(datatype="BYTES", shape=[1], parameters={"binary_data_size": len(content)})
    return behind(head, content)


BODIES: dict[str, Callable[[int], bytes]] = {
    "names": lambda n: f"{{{names(n)}}}".encode(),
    "names, the last twice": lambda n: f'{{{names(n)},"z":0,"z":0}}'.encode(),
    "names within, the last twice": lambda n: f'{{"image":{{{names(n)},"z":0,"z":0}}}}'.encode(),
    "one name": lambda n: b"{" + b'"a":0,' * (n // 6) + b'"b":0}',
    "names as parameters": lambda n: f'{{"inputs":[],"parameters":{{{names(n)}}}}}'.encode(),
    "long names": lambda n: f'{{"{"a" * n}":0}}'.encode(),
    "lists": lambda n: f'{{"image":[{"[]," * (n // 3)}[]]}}'.encode(),
    "lists in lists": lambda n: b'{"image":' + b"[" * (n // 2) + b"]" * (n // 2) + b"}",
    "objects in objects": lambda n: b'{"image":' + b'{"a":' * (n // 6) + b"0" + b"}" * (n // 6) + b"}",
    "texts": lambda n: b'{"images":[' + b'"",' * (n // 3) + b'""]}',
    "escapes": lambda n: b'{"image":"' + b"\\u0041" * (n // 6) + b'"}',
    "halves of characters": lambda n: b'{"image":"' + b"\\ud800" * (n // 6) + b'"}',
    "wide characters": lambda n: b'{"image":"' + "\U0001f6d1".encode() * (n // 4) + b'"}',
    "digits": lambda n: b'{"samples":' + b"9" * n + b"}",
    "numbers of 4000 digits": lambda n: b'{"samples":[' + b"9" * 4000 + (b"," + b"9" * 4000) * (n // 4001) + b"]}",
    "decimals": lambda n: b'{"samples":0.' + b"3" * n + b"}",
    "exponents": lambda n: b'{"samples":1e' + b"9" * n + b"}",
    "blanks": lambda n: b" " * n + b"x",
    "blanks in front": lambda n: b"\n" * n + b'{"image":""}',
    "UTF-16": lambda n: json.dumps({"image": "A" * (n // 2)}).encode("utf-16"),
    "base64": lambda n: json.dumps({"image": "A" * n}).encode(),
    "base64 and blanks": lambda n: json.dumps({"image": "A " * (n // 2)}).encode(),
    "base64 as the body": lambda n: b"iVBORw0KGgoA" + b"AAAA\n" * (n // 5),
    "padding": lambda n: json.dumps({"image": "=" * n}).encode(),
    "data URL without end": lambda n: json.dumps({"image": "data:" + ";" * n}).encode(),
    "sides": lambda n: tensor(datatype="UINT8", shape=[20000] * (n // 6), data=[]).encode(),
    "outputs": lambda n: b'{"inputs":[],"outputs":[' + b'{"name":"label"},' * (n // 17) + b"{}]}",
    "bytes as numbers": pixels("UINT8", "7"),
    "fractions": pixels("FP32", "0.5"),
    "large numbers": pixels("UINT8", "9" * 300),
    "pixels in lists": nested_pixels,
    "elements in lists": lambda n: tensor(datatype="BYTES", shape=[1], data=[[[0]]] * (n // 7)).encode(),
}
FORMS: dict[str, Callable[[int], bytes]] = {
    "fields": lambda n: forms.written(*[("a", b"")] * (n // 60)),
    "boundaries nearly": lambda n: forms.written(("image", b"\r\n--" * (n // 4))),
    "line ends": lambda n: forms.written(("image", b"\r" * n)),
    "headers of a field": lambda n: b"--x\r\n" + b"A: b\r\n" * (n // 6) + b"\r\n\r\n--x--\r\n",
    "a long header of a field": lambda n: b"--x\r\nContent-Disposition: form-data" + b'; a="' * (n // 5),
    "no form": lambda n: b"-" * n,
}
REQUESTS: dict[str, Callable[[int], tuple[bytes, dict[str, str]]]] = {
    **{name: lambda n, make=make: (make(n), JSON) for name, make in BODIES.items()},  # type: ignore[misc]
    **{name: lambda n, make=make: (make(n), FORM) for name, make in FORMS.items()},  # type: ignore[misc]
    "elements behind the JSON": lengths,
    "stale length": lambda n: (b'{"a":' * (n // 5), {"Inference-Header-Content-Length": str(n // 5 * 5 - 1)}),
    "gzip": lambda n: (gzip.compress(bytes(n), 1), {"Content-Encoding": "gzip"}),
}


def progressive(size: int) -> bytes:
    """A small JPEG of ever more scans."""
    return scans(8, max(10, size // 40))


def short_runs(size: int) -> bytes:
    return rle_bmp(512, 512, b"\1\0" * (size // 2))


def idle_chunks(kind: bytes, content: bytes = b"") -> Callable[[int], bytes]:
    return lambda n: little_png(chunk(kind, content) * (n // (12 + len(content))))


def segments(kind: int, content: bytes = b"") -> Callable[[int], bytes]:
    part = bytes([0xFF, kind]) + struct.pack(">H", 2 + len(content)) + content
    return lambda n: little_jpeg(part * (n // len(part)))


def webp(kind: bytes, flags: int = 0, content: bytes = b"") -> Callable[[int], bytes]:
    """Chunks of one kind in front of a picture of 8 x 8."""

    def made(size: int) -> bytes:
        some = (kind + struct.pack("<I", len(content)) + content) * (size // (8 + len(content)))
        head = b"VP8X" + struct.pack("<I", 10) + bytes((flags, 0, 0, 0, 7, 0, 0, 7, 0, 0))
        body = b"WEBP" + head + some + encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
        return b"RIFF" + struct.pack("<I", len(body)) + body

    return made


def bmp(offset: int, colours: int) -> bytes:
    header = struct.pack("<IHHI", offset + 64, 0, 0, offset)
    return b"BM" + header + struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 0, 0, 0, 0, colours, 0) + bytes(offset + 10)


IMAGES: dict[str, Callable[[int], bytes]] = {
    "chunks": idle_chunks(b"teXt"),
    "profiles": idle_chunks(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000), 9)),
    "packed texts": idle_chunks(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000), 9)),
    "packed international texts": idle_chunks(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(1_000_000), 9)),
    "palettes": idle_chunks(b"PLTE", bytes(768)),
    "transparencies": idle_chunks(b"tRNS", bytes(6)),
    "empty pixels": idle_chunks(b"IDAT"),
    "animation controls": idle_chunks(b"acTL", struct.pack(">II", 1, 0)),
    "EXIF blocks": idle_chunks(b"eXIf", exif(20, 240)),
    "tags": lambda n: little_png(chunk(b"eXIf", exif(min(n // 12, 50_000), 0))),
    "more pixels than are said": lambda n: png(8, 8, 2, 8, bytes(20 * n)),
    "comments": segments(0xFE),
    "segments": segments(0xE5, b"abc"),
    "EXIF segments": segments(0xE1, b"Exif\0\0" + exif(20, 240)),
    "JFIF segments": segments(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"),
    "Adobe segments": segments(0xEE, b"Adobe\0\x64\0\0\0\0\1"),
    "Huffman tables": segments(0xC4, b"\x10\1" + bytes(15) + b"\xe0"),
    "quantization tables": segments(0xDB, b"\1" + bytes(range(1, 129))),
    "large quantization tables": segments(0xDB, (b"\0" + bytes(range(1, 65))) * 1000),
    "restart intervals": segments(0xDD, b"\0\1"),
    "frames": segments(0xC0, b"\x08\0\x08\0\x08\1\1\x11\0"),
    "reserved segments": segments(0x02),
    "fill bytes": lambda n: little_jpeg(b"\xff" * n + b"\0"),
    "restart markers": lambda n: encoded(Image.new("L", (8, 8)), "JPEG")[:-2] + b"\xff\xd0" * (n // 2) + b"\xff\xd9",
    "starts": lambda n: b"\xff\xd8" * (n // 2),
    "scans": progressive,
    "runs": short_runs,
    "jumps": lambda n: rle_bmp(512, 512, b"\0\2\0\0" * (n // 4)),
    "WebP chunks": webp(b"XXXX"),
    "WebP profiles": webp(b"ICCP", 32, b"ab"),
    "WebP transparencies": webp(b"ALPH", 16, bytes(64)),
    "WebP frames": webp(b"ANMF", 2, bytes(16)),
    "BMP colours": lambda n: bmp(54 + n, n // 4),
    "BMP gap": lambda n: bmp(54 + n, 256),
    "comments in a scan": lambda n: little_jpeg(b"")[:-2] + b"\xff\xfe\0\2" * (n // 4) + b"\xff\xd9",
    "stuffed bytes": lambda n: little_jpeg(b"")[:-2] + b"\xff\0" * (n // 2) + b"\xff\xd9",
    "nothing": lambda n: b"\xff\xd8\xff" + bytes(n),
    "zeros": bytes,
}
