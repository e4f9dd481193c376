"""What is left of an image, chunk by chunk and segment by segment."""

import io
import re

import pytest
from PIL import Image, PngImagePlugin

from handlers.metadata import MAX_PARTS, DamagedError, ImageError, Stripped, strip_metadata
from tests.handlers.hostile import chunk, encoded, little_jpeg, little_png, scans

EXIF = Image.Exif()
EXIF[0x0112] = 6


def test_a_png_keeps_its_pixels_and_gives_its_exif_block() -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "x" * 1000, zip=True)
    image = Image.linear_gradient("L").convert("P")
    data = encoded(image, "PNG", pnginfo=texts, icc_profile=b"profile", exif=EXIF, transparency=3, dpi=(72, 72))
    stripped = strip_metadata(data + b"and more")
    left, exif = stripped.data, stripped.exif
    assert re.findall(rb"[A-Za-z]{4}(?<=IHDR|PLTE|tRNS|IDAT|IEND)", left)[:3] == [b"IHDR", b"PLTE", b"tRNS"]
    assert not re.search(rb"iCCP|zTXt|pHYs|eXIf|more", left)
    assert Image.open(io.BytesIO(left)).tobytes() == Image.open(io.BytesIO(data)).tobytes()
    assert b"Exif\0\0" + exif == EXIF.tobytes()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_keeps_its_pixels_and_gives_its_exif_block(mode: str) -> None:
    image = Image.linear_gradient("L").convert(mode)
    data = encoded(image, "JPEG", icc_profile=b"profile" * 20_000, exif=EXIF, comment=b"a comment", progressive=True)
    stripped = strip_metadata(data[:2] + b"\xff\xe1\0\x0aEx\xff\xdaxxxx" + data[2:] + b"and more")
    left, exif = stripped.data, stripped.exif
    assert not re.search(rb"profile|comment|Exif|xxxx|more", left)
    assert Image.open(io.BytesIO(left)).tobytes() == Image.open(io.BytesIO(data)).tobytes()
    assert b"Exif\0\0" + exif == EXIF.tobytes()


@pytest.mark.parametrize("marker", [b"\xff\xd9", b"\xff\xda"], ids=["behind the pixels", "between scans"])
def test_an_exif_block_of_a_jpeg_counts_in_front_of_its_pixels_only(marker: bytes) -> None:
    data, block = encoded(Image.linear_gradient("L"), "JPEG", progressive=True), EXIF.tobytes()
    late, segment = data.rindex(marker), b"\xff\xe1" + (2 + len(block)).to_bytes(2, "big") + block
    assert strip_metadata(data[:2] + segment + data[2:]).exif
    assert not strip_metadata(data[:late] + segment + data[late:]).exif


@pytest.mark.parametrize("marker", [b"", b"\xff", b"\xff\x01", b"\xff\xd0", b"\xff\x00", b"\x01"])
def test_every_scan_that_a_decoder_sees_is_counted(marker: bytes) -> None:
    """Some markers have no length, though the marker of a scan that follows them could be read as one."""
    data = scans(64, 10)
    last = data.rindex(b"\xff\xda")
    stripped = strip_metadata(data[:last] + (marker + data[last:-2]) * 40 + data[-2:])
    assert stripped.scans
    assert stripped.scans.count == 49


@pytest.mark.parametrize("format", ["WEBP", "BMP", "GIF"])
def test_other_formats_stay_as_they_are(format: str) -> None:
    data = encoded(Image.new("RGB", (8, 8)), format) + b"more"
    assert strip_metadata(data) == Stripped(data)


@pytest.mark.parametrize("data", [little_png(), little_jpeg(b"")], ids=["png", "jpeg"])
def test_every_beginning_of_an_image_is_kept_or_refused(data: bytes) -> None:
    for end in range(len(data)):
        try:
            left = strip_metadata(data[:end]).data
        except DamagedError:
            continue
        assert len(left) <= end


def test_parts_are_counted() -> None:
    for data in (little_png(chunk(b"teXt", b"") * MAX_PARTS), little_jpeg(b"\xff\xfe\0\2" * MAX_PARTS)):
        with pytest.raises(ImageError, match="more than 10000 parts"):
            strip_metadata(data)
