"""Requests that must be refused: broken and poisonous images, forms and JSON, options out of range, and bad HTTP.

Each is refused for certain, whatever the bundle: what only might be an image is for fuzzing, not for counting.
"""

import base64
import gzip
import io
import json
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from benchmarks.server.calls import Call, head

# A valid WebP of 46 bytes that unfolds to 16383 x 16383 pixels, 1 GB.
_WEBP_BOMB = bytes.fromhex(
    "5249464626000000574542505650384c1a0000002ffebfff0f074020698bb7fd0a01044041d382fec74744f43f00"
)


def hostile_calls(model: str, most_samples: int, seed: int = 0) -> list[Call]:
    """Several hundred requests, each with its kind; ``model`` is what the server calls the bundle."""
    rng = np.random.default_rng(seed)
    calls = [Call(body, _type("application/octet-stream"), kind=kind) for kind, body in _images(rng)]
    calls += [Call(body, _type("application/json"), kind=kind) for kind, body in _json(rng, most_samples)]
    calls += [Call(_picture(rng), headers, kind=kind) for kind, headers in _options(most_samples)]
    calls += list(_types(rng))
    calls += list(_http(model, _picture(rng)))
    return calls


def _images(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        whole = _picture(rng, kind, 96)
        for share in (0.2, 0.5, 0.8, 0.95):
            yield f"truncated {kind}", whole[: int(len(whole) * share)]
        yield f"only the first bytes of a {kind}", whole[:12]
    for kind in ("GIF", "TIFF", "PPM", "ICO", "TGA"):
        yield f"a {kind}", _picture(rng, kind)
    for text in (
        "hello",
        "<svg xmlns='http://www.w3.org/2000/svg'/>",
        "<html></html>",
        "<?php ?>",
        "%PDF-1.7",
        "PK\3\4",
    ):
        yield "no image", text.encode()
    for size in (1, 100, 10_000, 200_000):
        yield "random bytes", b"\1" + rng.bytes(size)
        yield "zeros", bytes(size)
    for kind in ("PNG", "WEBP"):
        frames = [_image(rng), _image(rng)]
        yield f"animated {kind}", _encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    for _ in range(8):
        damaged = bytearray(_picture(rng, "PNG", 64))
        damaged[len(damaged) // 2] ^= 1 + int(rng.integers(255))
        yield "damaged PNG", bytes(damaged)
    yield from _bombs(rng)


def _bombs(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Small files that promise more pixels, or more work, than anyone can take."""
    for width, height in ((50_000, 50_000), (1_000_000, 1), (5_200, 5_000), (2**31 - 1, 2**31 - 1), (0, 0)):
        yield "PNG bomb", _png(width, height)
    for width, height in ((50_000, 50_000), (65_535, 65_535)):
        jpeg = bytearray(_picture(rng, "JPEG"))
        frame = jpeg.index(b"\xff\xc0")
        jpeg[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
        yield "JPEG bomb", bytes(jpeg)
        bmp = bytearray(_picture(rng, "BMP"))
        bmp[18:26] = struct.pack("<ii", width, height)
        yield "BMP bomb", bytes(bmp)
        offset = 54 + 1024
        runs = b"\1\0" * 1000
        rle = struct.pack("<IHHI", offset + len(runs), 0, 0, offset)
        rle += struct.pack("<IiiHHIIiiII", 40, width // 16, height // 16, 1, 8, 1, len(runs), 0, 0, 256, 0)
        yield "run-length encoded BMP bomb", b"BM" + rle + bytes(1024) + runs
    yield "WebP bomb", _WEBP_BOMB
    chunk = struct.pack(">I", 0) + b"teXt" + struct.pack(">I", zlib.crc32(b"teXt"))
    whole = _picture(rng, "PNG")
    yield "PNG of endless chunks", whole[:33] + chunk * 20_000 + whole[33:]
    progressive = _encoded(_image(rng, 128), "JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")
    yield "JPEG of endless scans", progressive[:last] + progressive[last:-2] * 1000 + progressive[-2:]


def _json(rng: np.random.Generator, most_samples: int) -> Iterator[tuple[str, bytes]]:
    image = base64.b64encode(_picture(rng)).decode()
    for text in ("", "{", "nul", "[1, 2", '{"image": "', '{"image": NaN', "\ud83d".encode("utf-8", "surrogatepass")):
        yield "broken JSON", text if isinstance(text, bytes) else text.encode()
    for opening in ("[", '{"image":', '[{"image":'):
        for depth in (1_000, 100_000):
            yield "deep JSON", (opening * depth).encode()
    yield "deep JSON", b'{"image": ' + b"[" * 900 + b"]" * 900 + b"}"
    yield "deep JSON", b"[" * 50_000 + b"]" * 50_000
    yield "huge number in JSON", b'{"image": ' + b"9" * 100_000 + b"}"
    values: Sequence[object] = (None, 5, "text", [], [image], True, {})
    for value in values:
        yield "JSON without an image", json.dumps(value).encode()
    values = (None, 5, "", "!", "a", image[:41], [image], {"b64": image}, base64.b64encode(b"hello").decode())
    for value in values:
        yield "JSON with something else for an image", json.dumps({"image": value}).encode()
    yield "JSON with too many images", json.dumps({"images": [image] * 17}).encode()
    values = ([], None, image, {}, [None], [""])
    for value in values:
        yield "JSON with no list of images", json.dumps({"images": value}).encode()
    for name, wrong in _wrong_options(most_samples):
        yield f"JSON with a bad {name}", json.dumps({"image": image, name: wrong}).encode()
    values = (8.5, [], {}, True, -(10**30))
    for value in values:
        yield "JSON with samples of a wrong type", json.dumps({"image": image, "samples": value}).encode()
    yield "JSON with a name many times", b'{"image": "", ' + b'"samples": 1, ' * 100_000 + b'"top_k": 1}'
    yield "JSON of many lists", b'{"image": [' + b"[], " * 300_000 + b"[]]}"
    yield "data URL of nothing", json.dumps({"image": "data:image/png;base64,"}).encode()
    yield "JSON with many unknown names", json.dumps({"image": image} | {f"x{i}": i for i in range(10_000)}).encode()


def _wrong_options(most_samples: int) -> Iterator[tuple[str, str | int]]:
    for samples in (0, -1, most_samples + 1, 10**9, 10**18):
        yield "samples", samples
    for text in ("", "NaN", "inf", "1e3", "0x10", "1.0", "' OR 1=1", "1;2", "9" * 400):
        yield "samples", text
    for top_k in (0, -1, 10**9, "all"):
        yield "top_k", top_k
    for text in ("", "everything", "../../etc/passwd", "PURIFIED"):
        yield "return", text
        yield "alphas", f"no such {text}"
    for seed in (-1, 2**63, "x", "9" * 400):
        yield "seed", seed
    for name in ("sample", "__proto__", "temperature", "x" * 1000):
        yield name[:20], 1


def _options(most_samples: int) -> Iterator[tuple[str, bytes]]:
    for name, value in _wrong_options(most_samples):
        header = f"X-Mlvgm-{name.replace('_', '-').title()}"
        yield f"header with a bad {name}", f"{header}: {value}\r\n".encode() + _type("image/png")


def _types(rng: np.random.Generator) -> Iterator[Call]:
    """Good images that come as something else."""
    image = _picture(rng)
    form = _type("multipart/form-data; boundary=x")
    for body in (b"", b"--x", b"a=b"):
        yield Call(body, form, kind="broken form")
    # TorchServe's own reader of forms answers this with 500; behind nginx it is not asked.
    yield Call(b"--x\r\n\r\n--x--\r\n", form, kind="form without names", also_accept=500)
    for names in (["picture"], ["image", "data"], ["image", "samples"], []):
        parts = [_part(name, b"zero" if name == "samples" else image) for name in names]
        yield Call(b"".join([*parts, b"--x--\r\n"]), form, kind="form with the wrong fields")
    yield Call(b"image=hello", _type("application/x-www-form-urlencoded"), kind="web form")
    half = image[: len(image) // 2]
    yield Call(half, _type("application/json"), kind="truncated image as JSON")
    yield Call(half, _type("application/json; charset=utf-16"), kind="truncated image as JSON")
    packed = _type("application/octet-stream") + b"Content-Encoding: gzip\r\n"
    yield Call(gzip.compress(half, mtime=0), packed, kind="truncated image in gzip")
    yield Call(gzip.compress(image, mtime=0)[:-20], packed, kind="truncated gzip")
    yield Call(gzip.compress(bytes(100_000_000), mtime=0), packed, kind="gzip bomb")
    for text in ("hello", "\N{SNOWMAN}" * 100, "", "\0" * 100):
        yield Call(text.encode(), _type("text/plain"), kind="text")
    yield Call(b"hello", _type("\N{SNOWMAN}"), kind="no content type that exists")
    yield Call(b"hello", _type("x" * 3000), kind="no content type that exists")


def _http(model: str, image: bytes) -> Iterator[Call]:
    """What the server refuses before a worker sees it."""
    path, key = f"/predictions/{model}", b"{authorization}"

    def call(kind: str, path: str, headers: bytes = key) -> Call:
        return Call(image, kind=kind, start=head(path, headers, len(image)))

    yield call("no key", path, b"")
    yield call("wrong key", path, b"Authorization: Bearer wrong\r\n")
    yield call("key of another form", path, b"Authorization: Basic eDp4\r\n")
    for other in ("/predictions/none", "/predictions/", "/predictions/..%2f..%2fetc", "/none", f"{path}/9.9"):
        yield call("unknown path", other)
    yield call("long path", f"{path}/{'x' * 5000}")
    yield call("long header", path, key + b"X: %s\r\n" % (b"x" * 10_000))
    large = 7_000_000
    yield Call(bytes(large), kind="body above the limit", start=head(path, key + _type("image/png"), large))


def _part(name: str, body: bytes) -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), body)


def _type(name: str) -> bytes:
    return f"Content-Type: {name}\r\n".encode()


def _image(rng: np.random.Generator, side: int = 16) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))


def _picture(rng: np.random.Generator, kind: str = "PNG", side: int = 16) -> bytes:
    return _encoded(_image(rng, side), kind)


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
