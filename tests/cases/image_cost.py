"""What an image may cost: CPU time and memory of handlers.image.decode against an ordinary image of as many pixels.

    python tests/cases/image_cost.py      (from the project's root; Linux)

Every image here is within the documented limits. It may be decoded or refused, but neither may take many times the CPU
time, nor the memory, of an ordinary image of its kind with as many pixels.
"""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import zlib

sys.path.insert(0, os.getcwd())

import numpy as np
from PIL import Image

SIZE = (32, 32)
MOST_TIME, MOST_MEMORY = 5.0, 3.0
SMALL, SMALL_MB = 0.05, 60.0  # seconds of CPU and MB that are too little to compare
faults = 0
measured: dict[tuple[str, int, int], dict[str, object]] = {}


def ordinary_rgba(width: int, height: int) -> bytes:
    stripes = np.tile(np.arange(width, dtype=np.uint8)[None, :, None], (height, 1, 4))
    return _saved(Image.fromarray(stripes, "RGBA"), "PNG", compress_level=1)


def ordinary_jpeg(width: int, height: int) -> bytes:
    return _saved(_grainy(width, height), "JPEG", quality=25)


def _grainy(width: int, height: int) -> Image.Image:
    grain = Image.effect_noise((512, 512), 40).convert("RGB")
    image = Image.new("RGB", (width, height))
    for x in range(0, width, 512):
        for y in range(0, height, 512):
            image.paste(grain, (x, y))
    return image


def ordinary_palette(width: int, height: int) -> bytes:
    stripes = np.tile(np.arange(width, dtype=np.uint8)[None], (height, 1))
    return _saved(Image.fromarray(stripes).convert("P"), "PNG")


def ordinary_progressive(width: int, height: int) -> bytes:
    return _saved(_grainy(width, height), "JPEG", quality=15, progressive=True)


def bmp_short_rows(width: int, height: int) -> bytes:
    """Run-length encoded: every row is one pixel and an end of line."""
    return _bmp(width, height, b"\x01\x01\x00\x00" * height + b"\x00\x01")


def bmp_runs_of_one(width: int, height: int) -> bytes:
    return _bmp(width, height, b"\x01\x01" * (width * height) + b"\x00\x01")


def jpeg_refined(width: int, height: int, scans: int = 99) -> bytes:
    """Progressive: a scan of the DC coefficients, then scans that refine the AC ones and change nothing."""
    bits, left = "", (width // 8) * (height // 8)
    while left > 0:
        bits, left = bits + "0" + "1" * 14, left - 32767
    bits += "1" * (-len(bits) % 8)
    run = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\x00")
    table = b"\xff\xc4" + struct.pack(">H", 20) + b"\x10\x01" + bytes(15) + b"\xe0"
    refine = [
        b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([i % 3 + 1, 0]) + b"\x01\x3f\x10" + run for i in range(scans)
    ]
    return _progressive(width, height) + table + b"".join(refine) + b"\xff\xd9"


def jpeg_one_scan(width: int, height: int) -> bytes:
    """Progressive, and the one scan has the DC coefficients alone: the decoder keeps all coefficients of the image."""
    return _progressive(width, height) + b"\xff\xd9"


def _progressive(width: int, height: int) -> bytes:
    frame = b"\xff\xd8\xff\xdb\x00\x43\x00" + b"\x01" * 64
    frame += b"\xff\xc2" + struct.pack(">HBHHB", 17, 8, height, width, 3) + b"\x01\x11\x00\x02\x11\x00\x03\x11\x00"
    frame += b"\xff\xc4" + struct.pack(">H", 20) + b"\x00\x01" + bytes(16)
    blocks = (width // 8) * (height // 8) * 3
    return (
        frame
        + b"\xff\xda"
        + struct.pack(">HB", 12, 3)
        + b"\x01\x00\x02\x00\x03\x00\x00\x00\x00"
        + bytes(blocks // 8 + 1)
    )


def jpeg_without_end(width: int, height: int) -> bytes:
    return ordinary_jpeg(width, height)[:-2]


def png_transparent_colour(width: int, height: int) -> bytes:
    """16 bits a sample and one transparent colour, which Pillow does not know how to read."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)) + chunk(b"tRNS", b"UUUUUU")
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + b"\x55" * 6 * width) * height, 1))
    return b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b"")


def _bmp(width: int, height: int, data: bytes) -> bytes:
    place = 54 + 4 * 256
    head = b"BM" + struct.pack("<IHHI", place + len(data), 0, 0, place)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 2835, 2835, 256, 0)
    return head + info + bytes(4 * 256) + data


def _saved(image: Image.Image, kind: str, **how: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def measure(maker: str, width: int, height: int) -> dict[str, object]:
    """Seconds of CPU, MB at the peak above what was there before, and what came of it: each step in its own process."""
    if (maker, width, height) not in measured:
        make = [sys.executable, __file__, "make", maker, str(width), str(height)]
        image = subprocess.run(make, check=True, stdout=subprocess.PIPE, timeout=1500).stdout
        decode = [sys.executable, __file__, "decode"]
        found = subprocess.run(decode, input=image, check=True, stdout=subprocess.PIPE, timeout=1500).stdout
        measured[maker, width, height] = json.loads(found) | {"bytes": len(image)}
    return measured[maker, width, height]


def decode_stdin() -> None:
    from handlers.image import ImageError, decode

    data = sys.stdin.buffer.read()
    for kind in ("JPEG", "PNG", "BMP"):  # what is loaded at the first image
        decode(_saved(Image.new("RGB", (64, 64)), kind), SIZE)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        decode(data, SIZE)
        outcome = "decoded"
    except ImageError as error:
        outcome = f"refused ({error})"
    taken, peak = time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": taken, "mb": (peak - before) / 1024, "outcome": outcome}))


def report(name: str, good: bool, wanted: str, got: str) -> None:
    global faults
    faults += not good
    print(f"ok    {name} ({got})" if good else f"FAULT {name}: wanted {wanted}, got {got}", flush=True)


def check(maker: str, width: int, height: int, like: str) -> None:
    got, plain = measure(maker, width, height), measure(like, width, height)
    longer, larger = got["seconds"] / max(SMALL, plain["seconds"]), got["mb"] / max(SMALL_MB, plain["mb"])
    name = f"{maker} {width}x{height} of {got['bytes']:,} bytes"
    wanted = f"at most {MOST_TIME:.0f} times the CPU and {MOST_MEMORY:.0f} times the memory of {like}"
    words = f"{longer:.1f} and {larger:.1f} times; {got['outcome'][:60]}"
    report(name, longer <= MOST_TIME and larger <= MOST_MEMORY, wanted, words)


def main() -> int:
    for kind in ("rgba", "palette", "jpeg", "progressive"):
        got = measure(f"ordinary_{kind}", 4000, 3000)
        words = f"{got['outcome']}, {got['seconds']:.2f} s, {got['mb']:.0f} MB"
        report(f"control: ordinary_{kind} 4000x3000", got["outcome"] == "decoded", "an ordinary image decoded", words)
    check("bmp_short_rows", 20000, 838, "ordinary_palette")
    check("bmp_short_rows", 4096, 4096, "ordinary_palette")
    check("bmp_runs_of_one", 3276, 998, "ordinary_palette")
    check("jpeg_refined", 4096, 4096, "ordinary_progressive")
    check("jpeg_one_scan", 8000, 8000, "ordinary_jpeg")
    # As much as is accepted.
    check("bmp_short_rows", 362, 362, "ordinary_palette")
    check("bmp_runs_of_one", 362, 362, "ordinary_palette")
    check("jpeg_one_scan", 4096, 4096, "ordinary_progressive")
    check("jpeg_without_end", 4096, 4096, "ordinary_progressive")
    check("png_transparent_colour", 4096, 4096, "ordinary_rgba")
    return 1 if faults else 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", maker, width, height]:
            sys.stdout.buffer.write(globals()[maker](int(width), int(height)))
        case ["decode"]:
            decode_stdin()
        case _:
            sys.exit(main())
