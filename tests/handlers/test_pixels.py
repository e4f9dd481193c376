"""Pixels of generated files, equal to those of another decoder, or to those that the files were made from."""

import struct
import zlib
from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handlers.image import ImageError, decode
from tests.handlers.hostile import chunk, encoded

W, H = 37, 23
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of the passes of an interlaced PNG: the first column and row, and the steps."""


def smooth(channels: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    small = np.random.default_rng(seed).integers(0, 256, (6, 9, channels), np.uint8)
    planes = [Image.fromarray(small[..., i]).resize((W, H), Image.Resampling.BICUBIC) for i in range(channels)]
    return np.dstack([np.asarray(plane) for plane in planes])


# PNG: every type, depth and order, against the samples that it was made from.

COLOURS = {0: (1, (1, 2, 4, 8, 16)), 2: (3, (8, 16)), 3: (1, (1, 2, 4, 8)), 4: (2, (8, 16)), 6: (4, (8, 16))}
"""By type of colour: samples of a pixel, and the depths there are."""


def rows(samples: np.ndarray[Any, Any], depth: int) -> bytes:
    if depth == 16:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    bits = (samples[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return b"".join(b"\0" + np.packbits(row.astype(np.uint8).ravel()).tobytes() for row in bits)


def png(samples: np.ndarray[Any, Any], depth: int, colour: int, interlaced: bool, before: bytes = b"") -> bytes:
    passes = [samples[y::down, x::across] for x, y, across, down in ADAM7] if interlaced else [samples]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, depth, colour, 0, 0, interlaced))
    data = zlib.compress(b"".join(rows(each.reshape(len(each), -1), depth) for each in passes if each.size))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def on_white(colours: Any, opacity: Any) -> np.ndarray[Any, Any]:
    return np.asarray(colours * opacity[..., None] + 255 * (1 - opacity[..., None]))


@pytest.mark.parametrize("interlaced", [False, True], ids=["in order", "interlaced"])
@pytest.mark.parametrize("transparent", [False, True], ids=["opaque", "transparent"])
@pytest.mark.parametrize(("colour", "depth"), [(c, d) for c, (_, depths) in COLOURS.items() for d in depths])
def test_png(colour: int, depth: int, transparent: bool, interlaced: bool) -> None:
    generator = np.random.default_rng(depth)
    samples = generator.integers(0, 2**depth, (H, W, COLOURS[colour][0]))
    before, opacity = b"", np.ones((H, W))
    if colour == 3:
        palette = generator.integers(0, 256, (2**depth, 3)).astype(np.uint8)
        before, colours = chunk(b"PLTE", palette.tobytes()), palette[samples[..., 0]].astype(float)
        if transparent:
            opacities = generator.integers(0, 256, 2**depth).astype(np.uint8)
            before += chunk(b"tRNS", opacities.tobytes())
            opacity = opacities[samples[..., 0]] / 255
    else:
        if transparent:
            samples[3:9, 5:20] = samples[0, 0]
            before = chunk(b"tRNS", samples[0, 0].astype(">u2").tobytes())
        scaled = samples * 255 / (2**depth - 1)
        colours = scaled[..., :3] if colour in (2, 6) else np.repeat(scaled[..., :1], 3, axis=2)
        if colour in (4, 6):  # where there is an alpha channel, no colour is transparent beside it
            opacity = scaled[..., -1] / 255
        elif transparent:
            opacity = (samples != samples[0, 0]).any(axis=2).astype(float)
    difference = decode(png(samples, depth, colour, interlaced, before), (H, W)) - on_white(colours, opacity)
    assert np.abs(difference).max() < (2 if depth == 16 else 1)  # of 16 bits the upper eight are taken


# JPEG and WebP, against other builds of the libraries.

JPEGS: dict[str, dict[str, Any]] = {
    **{f"sampled {s}, quality {q}": {"subsampling": s, "quality": q} for s, q in product((0, 1, 2), (5, 75, 98))},
    "progressive": {"progressive": True},
    "progressive with restarts": {"progressive": True, "restart_marker_blocks": 2},
    "restarts": {"restart_marker_rows": 1},
    "RGB": {"keep_rgb": True},
}


def another(data: bytes, format: str) -> np.ndarray[Any, Any]:
    codecs = pytest.importorskip("imagecodecs", reason="needs imagecodecs")
    return np.asarray(getattr(codecs, f"{format}_decode")(data))


@pytest.mark.parametrize("name", JPEGS)
def test_jpeg(name: str) -> None:
    data = encoded(Image.fromarray(smooth()), "JPEG", **JPEGS[name])
    assert np.array_equal(decode(data, (H, W)), another(data, "jpeg8"))


def test_gray_jpeg() -> None:
    data = encoded(Image.fromarray(smooth()).convert("L"), "JPEG")
    assert np.array_equal(decode(data, (H, W)), np.repeat(another(data, "jpeg8")[..., None], 3, axis=2))


@pytest.mark.parametrize("space", ["CMYK", "YCCK"])
def test_jpeg_of_four_inks(space: str) -> None:
    """Adobe's programs, which write nearly all of them, store them inverted."""
    codecs = pytest.importorskip("imagecodecs", reason="needs imagecodecs")
    inks = smooth(4)
    data = codecs.jpeg8_encode(255 - inks, level=95, colorspace="CMYK", outcolorspace=space)
    read = 255 - codecs.jpeg8_decode(data, outcolorspace="CMYK").astype(float)
    expected = (255 - read[..., :3]) * (255 - read[..., 3:]) / 255
    assert np.abs(decode(data, (H, W)) - expected).max() <= 1


@pytest.mark.parametrize("predictor", range(1, 8))
def test_lossless_jpeg(predictor: int) -> None:
    codecs = pytest.importorskip("imagecodecs", reason="needs imagecodecs")
    data = codecs.jpeg8_encode(smooth(), lossless=True, predictor=predictor)
    assert np.array_equal(decode(data, (H, W)), smooth())


def test_large_lossless_jpeg() -> None:
    """It cannot be decoded at a fraction of its size."""
    codecs = pytest.importorskip("imagecodecs", reason="needs imagecodecs")
    large = np.tile(smooth(), (100, 60, 1))
    data = codecs.jpeg8_encode(large, lossless=True)
    assert np.array_equal(decode(data, (8, 8)), decode(large, (8, 8)))


def test_jpeg_of_twelve_bits_is_named() -> None:
    codecs = pytest.importorskip("imagecodecs", reason="needs imagecodecs")
    data = codecs.jpeg8_encode(smooth().astype(np.uint16) * 16, bitspersample=12)
    with pytest.raises(ImageError, match="12 bits"):
        decode(data, (H, W))


ARITHMETIC = bytes.fromhex(
    "ffd8ffe000104a46494600010100000100010000ffdb004300030202030202030303030403030405080505040405"
    "0a070706080c0a0c0c0b0a0b0b0d0e12100d0e110e0b0b1016101113141515150c0f171816141812141514ffc900"
    "0b080010001001011100ffcc000600101005ffda0008010100003f00ff00dc1bd9abd9c7a5360c0a423842b49556"
    "2c8edf5b7279c488ff00dfa0ffd9"
)
"""9 x + 7 y in gray, 16 x 16, of `jpegtran -arithmetic`; no encoder that Python has writes one."""


@pytest.mark.parametrize("tables", [0, 948])
def test_arithmetic_jpeg(tables: int) -> None:
    """Its decoder cannot wait for more data, as after 65,536 bytes, which lie within its scan."""
    data = ARITHMETIC[:20] + ARITHMETIC[20:89] * tables + ARITHMETIC[20:]
    y, x = np.mgrid[0:16, 0:16]
    assert np.abs(decode(data, (16, 16)) - (9 * x + 7 * y)[..., None]).max() <= 1
    with pytest.raises(ImageError, match="truncated"):
        decode(data[:-2], (16, 16))  # which may be all of it, or not


@pytest.mark.parametrize("options", [{"quality": 0}, {"quality": 80}, {"lossless": True}])
@pytest.mark.parametrize("channels", [3, 4])
def test_webp(options: dict[str, Any], channels: int) -> None:
    data = encoded(Image.fromarray(smooth(channels)), "WEBP", exact=True, **options)
    read = another(data, "webp").astype(float)
    opacity = read[..., 3] / 255 if channels == 4 else np.ones((H, W))
    assert np.abs(decode(data, (H, W)) - on_white(read[..., :3], opacity)).max() < 1


# BMP: headers of every age.


def bmp(
    bits: int, data: bytes, palette: bytes = b"", header: int = 40, masks: tuple[int, ...] = (), up: int = 1
) -> bytes:
    compression = 3 if masks else 0
    if header == 12:
        info = struct.pack("<IHHHH", 12, W, H, 1, bits)
    else:
        info = struct.pack(
            "<IiiHHIIiiII", header, W, up * H, 1, bits, compression, len(data), 0, 0, len(palette) // 4, 0
        )
    info += struct.pack(f"<{len(masks)}I", *masks)
    info += bytes(max(0, header - len(info))) + palette
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(data), 0, 0, 14 + len(info)) + info + data


def padded(values: np.ndarray[Any, Any]) -> bytes:
    """Rows, each a multiple of four bytes."""
    return b"".join(row.tobytes() + bytes(-len(row.tobytes()) % 4) for row in values)


RGB = smooth()
BGR = RGB[::-1, :, ::-1]  # from the bottom up
FULL = np.full((H, W), 255, np.uint8)
FIVE = RGB[::-1].astype(np.uint16) >> 3
PALETTE = np.random.default_rng(1).integers(0, 256, (256, 4)).astype(np.uint8)
INDICES = np.random.default_rng(2).integers(0, 256, (H, W)).astype(np.uint8)
MASKS = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
BMPS: dict[str, bytes] = {
    "24 bits": bmp(24, padded(BGR)),
    "24 bits from the top": bmp(24, padded(BGR[::-1]), up=-1),
    "24 bits of OS/2": bmp(24, padded(BGR), header=12),
    "32 bits, the fourth byte empty": bmp(32, np.dstack([BGR, FULL * 0]).tobytes()),
    "32 bits with masks": bmp(32, np.dstack([BGR, FULL * 0]).tobytes(), masks=MASKS[:3]),
    "32 bits with masks elsewhere": bmp(32, np.dstack([FULL * 0, BGR]).tobytes(), masks=(0xFF000000, 0xFF0000, 0xFF00)),
    **{
        f"32 bits, header of {size}": bmp(32, np.dstack([BGR, FULL]).tobytes(), header=size, masks=MASKS)
        for size in (56, 108, 124)
    },
}


@pytest.mark.parametrize("name", BMPS)
def test_bmp(name: str) -> None:
    assert np.array_equal(decode(BMPS[name], (H, W)), RGB)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bmp_with_a_palette(bits: int) -> None:
    values = INDICES & (2**bits - 1)
    spread = (values[::-1, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    data = bmp(bits, padded(np.packbits(spread.reshape(H, -1), axis=1)), PALETTE[: 2**bits].tobytes())
    assert np.array_equal(decode(data, (H, W)), PALETTE[:, 2::-1][values])


@pytest.mark.parametrize(("masks", "greens"), [((), 31), ((0xF800, 0x7E0, 0x1F), 63)], ids=["555", "565"])
def test_bmp_of_16_bits(masks: tuple[int, ...], greens: int) -> None:
    levels = RGB[::-1].astype(np.uint16) >> np.array([3, 2 if greens == 63 else 3, 3], np.uint16)
    red, green, blue = (levels[..., i] for i in range(3))
    data = bmp(16, padded((red * (greens + 1) * 32 + green * 32 + blue).astype("<u2")), masks=masks)
    expected = levels[::-1] * 255 / np.array([31, greens, 31])
    assert np.abs(decode(data, (H, W)) - expected).max() <= 1
    assert np.array_equal(decode(data, (H, W)), another(data, "bmp")[..., :3])


def run_length(values: np.ndarray[Any, Any]) -> bytes:
    """Runs, and where neighbours differ their indices."""
    out = bytearray()
    for row in values:
        place = 0
        while place < W:
            run = next((i for i in range(place, W) if row[i] != row[place]), W) - place
            if run >= 3 or place + 3 > W:
                out += bytes([min(run, 255), row[place]])
                place += run
            else:
                out += bytes([0, 3, *row[place : place + 3], 0])
                place += 3
        out += b"\0\0"
    return bytes(out + b"\0\1")


def test_run_length_encoded_bmp() -> None:
    values = np.kron(INDICES[:6, :8], np.ones((4, 5), np.uint8))[:H, :W]
    values[5] = INDICES[5]
    data = bytearray(bmp(8, run_length(values[::-1]), PALETTE.tobytes()))
    data[30] = 1
    assert np.array_equal(decode(bytes(data), (H, W)), PALETTE[:, 2::-1][values])


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("colours", [2, 3, 16])
def test_bmp_with_a_gray_palette_is_read_right_or_refused(bits: int, colours: int) -> None:
    levels = np.array([0, 255] if colours == 2 else range(colours), np.uint8)[: 2**bits]
    values = INDICES % len(levels)
    spread = (values[::-1, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    palette = np.repeat(levels[:, None], 4, axis=1).tobytes()
    data = bmp(bits, padded(np.packbits(spread.reshape(H, -1), axis=1)), palette)
    if bits == 4 or (bits == 8 and colours == 2):
        with pytest.raises(ImageError, match="this kind of BMP is not read"):
            decode(data, (H, W))
    else:
        assert np.array_equal(decode(data, (H, W))[..., 0], levels[values])


@pytest.mark.parametrize(
    ("bits", "compression", "masks"),
    [
        (4, 2, ()),  # run-length encoded
        (24, 4, ()),  # a JPEG within
        (16, 3, (0xF00, 0xF0, 0xF)),
        (32, 3, (0x3FF00000, 0xFFC00, 0x3FF)),
    ],
)
def test_other_kinds_of_bmp_are_named(bits: int, compression: int, masks: tuple[int, ...]) -> None:
    data = bytearray(bmp(bits, bytes(8 * H * W), PALETTE[:16].tobytes() if bits == 4 else b"", masks=masks))
    data[30] = compression
    with pytest.raises(ImageError, match="this kind of BMP is not read"):
        decode(bytes(data), (H, W))


# Cut off anywhere.

WHOLE: dict[str, bytes] = {
    **{f"JPEG, {name}": encoded(Image.fromarray(RGB), "JPEG", **options) for name, options in JPEGS.items()},
    "gray JPEG": encoded(Image.fromarray(RGB).convert("L"), "JPEG"),
    "PNG": encoded(Image.fromarray(RGB), "PNG"),
    "palette PNG": encoded(Image.fromarray(RGB).convert("P"), "PNG", transparency=1),
    "WebP": encoded(Image.fromarray(RGB), "WEBP"),
    "lossless WebP": encoded(Image.fromarray(RGB), "WEBP", lossless=True),
    "BMP": BMPS["24 bits"],
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_cut_off_gives_all_its_pixels_or_none(name: str) -> None:
    data = WHOLE[name]
    whole = decode(data, (H, W))
    for end in range(1, len(data)):
        try:
            cut = decode(data[:end], (H, W))
        except ImageError:
            continue
        assert np.array_equal(cut, whole), end - len(data)
    if "JPEG" in name and name != "JPEG, progressive with restarts":
        assert np.array_equal(decode(data[:-2], (H, W)), whole)
