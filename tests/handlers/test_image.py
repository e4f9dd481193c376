import gzip
import io
import re
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from handlers.image import MAX_JPEG_SCANS, ImageError, decode, encode_png, is_costly
from tests.handlers.hostile import COSTLY, chunk, encoded, little_png, png, scans, webp_of_many_codes, wide_png

Pixels = npt.NDArray[np.uint8]
SIZE = (16, 16)

# A valid WebP of 46 bytes that unfolds to 16383 x 16383 pixels, 1 GB.
WEBP_BOMB = bytes.fromhex(
    "5249464626000000574542505650384c1a0000002ffebfff0f074020698bb7fd0a01044041d382fec74744f43f00"
)


def picture(size: tuple[int, int] = SIZE, mode: str = "RGB") -> Image.Image:
    """A smooth picture with four different corners."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def reason(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, SIZE)
    message = str(caught.value)
    assert message.isascii()
    assert "\n" not in message
    return message


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
def test_pixels_of_the_right_size_stay_untouched(format: str) -> None:
    image = picture()
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(decode(encoded(image, format, **options), SIZE), np.asarray(image))


def test_jpeg_is_what_pillow_decodes() -> None:
    data = encoded(picture(), "JPEG")
    assert np.array_equal(decode(data, SIZE), np.asarray(Image.open(io.BytesIO(data))))


def test_other_sizes_are_resized_with_antialiasing() -> None:
    """A pattern of single black and white pixels must become gray, not a moire of some of them."""
    checkers = Image.fromarray(np.indices((64, 64)).sum(axis=0).astype(np.uint8) % 2 * 255).convert("RGB")
    assert np.abs(decode(encoded(checkers, "PNG"), SIZE).astype(int) - 128).max() <= 2


def test_height_and_width_are_not_confused() -> None:
    assert decode(encoded(picture((40, 20)), "PNG"), (8, 24)).shape == (8, 24, 3)


@pytest.mark.parametrize(("mode", "tolerance"), [("L", 0), ("1", 0), ("P", 0), ("RGBA", 0), ("LA", 0)])
def test_png_modes(mode: str, tolerance: int) -> None:
    image = picture(mode=mode)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(decode(encoded(image, "PNG"), SIZE) - expected).max() <= tolerance


def test_cmyk_jpeg() -> None:
    expected = np.asarray(picture()).astype(int)
    assert np.abs(decode(encoded(picture(mode="CMYK"), "JPEG", quality=95), SIZE) - expected).mean() < 12


def test_gray_jpeg() -> None:
    expected = np.asarray(picture(mode="L").convert("RGB")).astype(int)
    assert np.abs(decode(encoded(picture(mode="L"), "JPEG", quality=95), SIZE) - expected).max() < 12


def test_sixteen_bits_of_gray_keep_their_brightness() -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    expected = np.rint(values / 65535 * 255)[:, :, None]
    assert np.abs(decode(png(16, 16, 0, 16, rows), SIZE) - expected).max() <= 1


def test_sixteen_bits_of_colour_keep_their_brightness() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (16, 48)).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    assert np.abs(decode(png(16, 16, 2, 16, rows), SIZE) - values.reshape(16, 16, 3) / 257).max() <= 1


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 8, 16))
    image.paste((0, 0, 0, 128), (8, 0, 12, 16))
    pixels = decode(encoded(image, "PNG"), SIZE)
    assert pixels[0, 0].tolist() == [0, 0, 200]
    assert np.abs(pixels[0, 9].astype(int) - 127).max() <= 1
    assert pixels[0, 15].tolist() == [255, 255, 255]


def test_transparent_palette_is_laid_on_white() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(1, (0, 0, 8, 16))
    pixels = decode(encoded(image, "PNG", transparency=0), SIZE)
    assert pixels[0, 0].tolist() == [40, 50, 60]
    assert pixels[0, 15].tolist() == [255, 255, 255]


def test_a_transparent_colour_is_laid_on_white() -> None:
    image = Image.new("RGB", (16, 16), (1, 2, 3))
    assert (decode(encoded(image, "PNG", transparency=(1, 2, 3)), SIZE) == 255).all()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(format: str, order: str, orientation: int) -> None:
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    data = encoded(picture((16, 24)), format, exif=exif, **({} if format == "JPEG" else {"lossless": True}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(decode(data, (expected.height, expected.width)), np.asarray(expected))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_damaged_exif_block_does_not_matter(exif: bytes) -> None:
    decode(encoded(picture(), "JPEG", exif=exif), SIZE)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animations_are_refused(format: str) -> None:
    frames = [picture(), picture().transpose(Image.Transpose.ROTATE_90)]
    assert "animated" in reason(encoded(frames[0], format, save_all=True, append_images=frames[1:]))


def frame(number: int) -> bytes:
    """The control chunk of a frame of an animated PNG of 8 x 8."""
    return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 8, 8, 0, 0, 1, 1, 0, 0))


def test_an_animated_png_of_one_frame_is_an_image() -> None:
    control = chunk(b"acTL", struct.pack(">II", 1, 0))
    assert np.array_equal(decode(little_png(control + frame(0)), (8, 8)), np.zeros((8, 8, 3)))
    hidden = frame(0) + chunk(b"fdAT", bytes(4) + zlib.compress(b"\0" * 25 * 8))
    assert "animated" in reason(little_png(control, hidden))  # beside the frame, there is another image


@pytest.mark.parametrize("late", [chunk(b"tRNS", bytes(6)), chunk(b"acTL", struct.pack(">II", 2, 0)), frame(0)])
def test_chunks_behind_the_pixels_mean_nothing(late: bytes) -> None:
    assert np.array_equal(decode(little_png(after=late), (8, 8)), np.zeros((8, 8, 3)))


PASSES = ["16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777"]
"""In which pass of an interlaced PNG each pixel of 8 x 8 comes."""


def row_lengths(width: int, height: int, bits: int, interlaced: bool) -> list[int]:
    """Bytes of each row of a PNG, with its filter."""
    if not interlaced:
        return [1 + (width * bits + 7) // 8] * height
    rows = [(PASSES[y % 8] * 2)[:width] for y in range(height)]
    counts = [row.count(number) for number in "1234567" for row in rows]
    return [1 + (count * bits + 7) // 8 for count in counts if count]


@pytest.mark.parametrize("interlaced", [False, True], ids=["", "interlaced"])
@pytest.mark.parametrize(("colour", "depth", "bits"), [(0, 1, 1), (0, 16, 16), (2, 8, 24), (3, 4, 4), (6, 16, 64)])
@pytest.mark.parametrize(("width", "height"), [(11, 13), (1, 5), (4, 1), (8, 8)])
def test_a_png_whose_pixels_end_early_is_refused(
    width: int, height: int, colour: int, depth: int, bits: int, interlaced: bool
) -> None:
    """Its data is packed whole, so no decoder says a word: the missing rows are black."""
    palette = chunk(b"PLTE", bytes(9)) if colour == 3 else b""
    lengths = row_lengths(width, height, bits, interlaced)
    rows = b"".join(bytes(length) for length in lengths)
    decode(png(width, height, colour, depth, rows, palette, interlaced=interlaced), SIZE)
    for short in (1, lengths[-1], len(rows) // 2, len(rows) - 1):
        assert "truncated" in reason(png(width, height, colour, depth, rows[:-short], palette, interlaced=interlaced))


def test_of_a_photo_with_a_second_picture_the_first_is_taken() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(mode="L")])
    assert np.array_equal(decode(data, SIZE), decode(encoded(picture(), "JPEG"), SIZE))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("tail", [b"PK\3\4 an archive", b"<script>", b"%PDF-1.7", b"\xff\xd8\xff\xe0", b"\0" * 99])
def test_of_polyglots_the_image_is_taken(format: str, tail: bytes) -> None:
    data = encoded(picture(), format)
    assert np.array_equal(decode(data + tail, SIZE), decode(data, SIZE))


@pytest.mark.parametrize("head", [b"%PDF-1.7\n", b"PK\3\4", b"GIF89a", b"\n", b"\xef\xbb\xbf"])
def test_what_has_something_before_the_image_is_none(head: bytes) -> None:
    assert reason(head + encoded(picture(), "PNG")).startswith("not a JPEG, PNG, WebP or BMP image")


def test_pixels_are_taken_as_they_are_or_resized() -> None:
    pixels = np.asarray(picture((40, 20)))
    assert np.array_equal(decode(pixels, (40, 20)), pixels)
    assert np.array_equal(decode(pixels, SIZE), decode(encoded(picture((40, 20)), "PNG"), SIZE))


@pytest.mark.parametrize("format", ["BMP", "PNG", "WEBP"])
def test_images_without_pixels_are_refused(format: str) -> None:
    data = bytearray(encoded(picture(), format, **({"lossless": True} if format == "WEBP" else {})))
    place, empty = {"BMP": (18, struct.pack("<i", 0)), "PNG": (16, struct.pack(">I", 0)), "WEBP": (20, b"\0")}[format]
    data[place : place + len(empty)] = empty
    reason(bytes(data))


def test_images_that_come_together_share_their_pixels() -> None:
    data = encoded(Image.new("RGB", (2000, 1000)), "PNG")
    decode(data, SIZE, images_in_request=8)
    with pytest.raises(ImageError, match="2000x1000, at most 1048576 pixels of each of 16 images"):
        decode(data, SIZE, images_in_request=16)


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "JPEG"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_images_are_refused(format: str, share: float) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(image, format)
    assert "truncated" in reason(data[: int(len(data) * share)])


@pytest.mark.parametrize("format", ["GIF", "TIFF", "ICO", "PDF", "AVIF"])
def test_other_formats_are_refused_by_name(format: str) -> None:
    assert reason(encoded(picture(), format)) == f"not a JPEG, PNG, WebP or BMP image, but {format}"


@pytest.mark.parametrize(
    ("start", "format"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0heicmif1", "HEIC"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0mp42avc1", "MP4"),
        (b"MM\0*\0\0\0\x08", "TIFF"),
        (b"\xff\x0a\xff\x0a", "JPEG XL"),
        (gzip.compress(b"an image"), "gzip"),
    ],
)
def test_formats_of_cameras_and_archives_are_named(start: bytes, format: str) -> None:
    assert reason(start + bytes(100)) == f"not a JPEG, PNG, WebP or BMP image, but {format}"


@pytest.mark.parametrize("format", ["PPM", "TGA"])
def test_other_formats_are_refused(format: str) -> None:
    assert reason(encoded(picture(), format)) == "not a JPEG, PNG, WebP or BMP image"


@pytest.mark.parametrize(
    "data", [b"hello", b"<svg/>", b"\0" * 1000, b"{}", b"\x89PNG\r\n\x1a\n", b"%PDF", b"\xff\xd8\xff"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    reason(data)


def test_an_empty_body_is_named() -> None:
    assert "empty" in reason(b"")


def test_a_damaged_png_is_refused() -> None:
    data = bytearray(encoded(picture((64, 64)), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert "damaged" in reason(bytes(data))


def test_a_jpeg_cannot_pass_for_a_webp() -> None:
    data = scans(16, MAX_JPEG_SCANS + 1)
    assert "too many scans" in reason(data[:2] + b"\xff\xfe\0\x08..WEBP" + data[2:])


def test_jpegs_with_endless_scans_are_refused() -> None:
    data = encoded(picture((256, 256)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 2000 + data[-2:]
    start = time.process_time()
    assert f"at most {MAX_JPEG_SCANS}" in reason(bomb)
    assert time.process_time() - start < 1
    decode(data, SIZE)


def bombs() -> dict[str, bytes]:
    """Small files whose headers promise 50,000 x 50,000 pixels, or as many as the format allows."""
    jpeg = bytearray(encoded(picture(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 50_000, 50_000)
    bmp = bytearray(encoded(picture(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    return {
        "png": png(50_000, 50_000, 2, 8, b"\0" * 1000),
        "black and white png": png(50_000, 50_000, 0, 1, b"\0" * 1000),
        "png of 26 million pixels": png(5_200, 5_000, 2, 8, b"\0" * 1000),
        "long png": png(1_000_000, 1, 2, 8, b"\0" * 1000),
        "jpeg": bytes(jpeg),
        "bmp": bytes(bmp),
        "webp": WEBP_BOMB,
    }


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_by_their_header(name: str) -> None:
    start = time.process_time()
    assert re.search("too large|damaged", reason(bombs()[name]))
    assert time.process_time() - start < 1


def decoded_within(megabytes: int, images: list[bytes]) -> list[str]:
    """What becomes of ``images`` in a process that may take so much memory beyond what it starts with.

    After each outcome come the seconds of CPU it took.
    """
    program = f"""
import resource, struct, sys, time
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from handlers.image import ImageError, decode
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {megabytes}_000_000,) * 2)
while size := sys.stdin.buffer.read(4):
    data = sys.stdin.buffer.read(struct.unpack("<I", size)[0])
    start = time.process_time()
    try:
        outcome = "x".join(map(str, decode(data, (16, 16)).shape))
    except ImageError as error:
        outcome = str(error)
    print(f"{{outcome}} | {{time.process_time() - start}}")
"""
    sent = b"".join(struct.pack("<I", len(image)) + image for image in images)
    done = subprocess.run([sys.executable, "-c", program], input=sent, capture_output=True)
    return done.stdout.decode().splitlines()


def test_bombs_take_no_memory() -> None:
    outcomes = decoded_within(50, list(bombs().values()))
    assert len(outcomes) == len(bombs())
    assert all(re.search("too large|damaged", outcome) for outcome in outcomes)


def test_lossless_jpegs_of_another_kind_are_told_from_damaged_ones() -> None:
    data = encoded(picture(), "JPEG")
    assert "save it as an ordinary JPEG" in reason(data.replace(b"\xff\xc0", b"\xff\xf7"))


def test_a_large_photo_is_decoded_at_a_fraction() -> None:
    """36 million pixels would need 144 MB in full."""
    photo = encoded(Image.new("RGB", (6000, 6000), "teal"), "JPEG")
    assert [outcome.partition(" | ")[0] for outcome in decoded_within(80, [photo])] == ["16x16x3"]


@pytest.mark.parametrize("name", COSTLY)
def test_costly_images_are_read_or_refused_within_bounds(name: str) -> None:
    """A third of a gigabyte and, on a machine that is not slowed down, 1.5 seconds; WebP takes most of the one."""
    data = COSTLY[name]()
    assert len(data) < 6_553_500
    (outcome,) = decoded_within(400, [data])
    said, _, seconds = outcome.partition(" | ")
    assert re.match("16x16x3|the image is truncated|the image has more than|the scans of|the run-length", said)
    assert float(seconds) < 10


def test_a_fraction_looks_like_the_whole() -> None:
    photo = Image.linear_gradient("L").resize((2400, 2000)).convert("RGB")
    expected = np.asarray(photo.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decode(encoded(photo, "JPEG"), (64, 64)) - expected).max() <= 3


@settings(max_examples=200)
@given(st.binary(max_size=200), st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"]), st.integers(0, 300))
def test_garbage_never_raises_anything_else(garbage: bytes, format: str, place: int) -> None:
    data = encoded(picture(), format)
    data = data[:place] + garbage + data[place + len(garbage) :]
    try:
        pixels: Pixels = decode(data, SIZE)
    except ImageError:
        return
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8


def test_png_of_a_purified_image_can_be_read_back() -> None:
    image = np.random.default_rng(0).uniform(-0.1, 1.1, (3, 16, 16)).astype(np.float32)
    pixels = decode(encode_png(image), SIZE)
    assert np.abs(pixels.transpose(2, 0, 1) / 255 - image.clip(0, 1)).max() <= 0.5 / 255 + 1e-6


def test_the_largest_purified_image_is_no_larger_than_an_answer_may_be() -> None:
    """1024 x 1024 pixels of noise, which no PNG makes smaller; 6,553,500 bytes is TorchServe's own limit."""
    assert len(encode_png(np.random.default_rng(0).random((3, 1024, 1024), np.float32))) < 6_553_500


def test_costly_images_are_known_by_their_headers() -> None:
    ordinary = [b"", b"hello", encoded(Image.new("RGB", (2000, 2000)), "PNG"), np.zeros((8, 8, 3), np.uint8)]
    photograph = encoded(Image.new("RGB", (6000, 4000)), "JPEG")
    refused = [WEBP_BOMB, encoded(Image.new("1", (8000, 8000)), "PNG")]
    assert not any(map(is_costly, [*ordinary, photograph, *refused]))
    assert not is_costly(encoded(Image.new("L", (3000, 3000)), "PNG"), images_in_request=16)
    large = [
        wide_png(6, 16, 4),
        scans(1000, 60),
        encoded(Image.new("RGB", (3000, 1500)), "WEBP"),
        webp_of_many_codes(1024),
    ]
    assert all(map(is_costly, large))


def test_a_palette_that_is_missing_is_said() -> None:
    rows = (b"\0" + bytes(range(8))) * 8
    assert "no palette" in reason(png(8, 8, 3, 8, rows))
    assert "no palette" in reason(png(8, 8, 3, 8, rows, chunk(b"PLTE", b"")))
    assert decode(png(8, 8, 3, 8, rows, chunk(b"PLTE", bytes(range(24)))), (8, 8))[0, 7].tolist() == [21, 22, 23]
