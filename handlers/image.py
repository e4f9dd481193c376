"""Images as they come over the wire, to pixels and back. Whatever is sent, time and memory stay bounded.

JPEG, PNG, WebP and BMP are read. The EXIF orientation is applied and transparency is laid on white; CMYK, grayscale,
palette and 16-bit images become 8-bit RGB without colour management. Animations are refused: which frame was meant is
anyone's guess.
"""

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from handlers.errors import MlvgmError
from handlers.essentials import essentials

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_SIDE = 20_000
MAX_PIXELS = 16_777_216  # WebP takes 16 bytes for each while it is decoded
MAX_JPEG_PIXELS = 64_000_000  # in one scan, it can be decoded at a fraction of its size, so larger ones are affordable
MAX_JPEG_SCANS = 100  # each scan of a progressive JPEG visits every pixel; cameras write about ten
_FULL_DECODE_PIXELS = 4_000_000
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BAND = 256  # rows

Pixels = npt.NDArray[np.uint8]


class ImageError(MlvgmError, ValueError):
    """These bytes are not an image that can be answered; the message is ASCII and fit for the client."""


def image_files(folder: Path) -> Iterator[Path]:
    """The image files below ``folder``, by name."""
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file())


def decode(image: bytes | Pixels, size: tuple[int, int], sharers: int = 1) -> Pixels:
    """An encoded image, or uint8 (H, W, 3) as it is, as uint8 (H, W, 3) with ``size`` = (H, W).

    An image of another size is resized, bilinear with antialiasing and without keeping its aspect ratio, as for the
    training of the classifiers; one of that very size keeps its pixels untouched.

    Args:
        sharers: images that came together; each may have its share of the pixels that one alone may have.

    Raises:
        ImageError: not an image of the four formats, too large, animated, truncated or damaged.
    """
    if isinstance(image, np.ndarray):
        return _fitted(Image.fromarray(image), size)
    if not image:
        raise ImageError("no image: the body is empty")
    try:
        data, exif = essentials(image)
        opened = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
        _check_header(opened, data, sharers)
        return _pixels(opened, exif or opened.info.get("exif", b""), size)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not a JPEG, PNG, WebP or BMP image") from None
    except (Image.DecompressionBombError, MemoryError):
        raise ImageError(f"the image is too large: at most {MAX_PIXELS // sharers} pixels are accepted") from None
    except Exception:  # decoders raise nearly anything on hostile bytes
        raise ImageError("the image is truncated or damaged") from None


def encode_png(image: npt.NDArray[np.float32]) -> bytes:
    """A PNG of float (3, H, W), nominally in [0, 1]; what lies outside is clipped."""
    pixels = np.rint(image.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
    return stream.getvalue()


def _check_header(image: Image.Image, data: bytes, sharers: int) -> None:
    """Refuse by what the header says, before a single pixel is decoded."""
    width, height = image.size
    is_jpeg = image.format == "JPEG"
    scans = data.count(b"\xff\xda") if is_jpeg else 1
    limit = (MAX_JPEG_PIXELS if is_jpeg and scans == 1 else MAX_PIXELS) // sharers
    if max(width, height) > MAX_SIDE or width * height > limit:
        among = f" of each of {sharers} images" if sharers > 1 else ""
        raise ImageError(f"the image is too large: {width}x{height}, at most {limit} pixels{among} are accepted")
    if scans > MAX_JPEG_SCANS:
        raise ImageError(f"the JPEG has too many scans: at most {MAX_JPEG_SCANS} are accepted")
    if getattr(image, "is_animated", False):
        raise ImageError("the image is animated: send one frame")


def _pixels(image: Image.Image, exif: bytes, size: tuple[int, int]) -> Pixels:
    if image.width * image.height > _FULL_DECODE_PIXELS:
        # For JPEG: decode at 1/2, 1/4 or 1/8, but never below twice the wanted size, where antialiasing still decides.
        side = 2 * max(size)
        image.draft(image.mode, (side, side))
    image = _rgb(image)
    if (turn := _TURNS.get(_orientation(exif))) is not None:
        image = image.transpose(turn)
    return _fitted(image, size)


def _fitted(image: Image.Image, size: tuple[int, int]) -> Pixels:
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _orientation(exif: bytes) -> int:
    """1 to 8, as EXIF counts; 1, upright, when the block is damaged or does not say."""
    block = exif.removeprefix(b"Exif\0\0")
    order = ">" if block.startswith(b"MM") else "<"
    try:
        (directory,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, directory)
        for i in range(count):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", block, directory + 2 + 12 * i)
            if tag == _ORIENTATION:
                return int(value)
    except struct.error:
        return 1
    return 1


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, a band of rows at a time where there is something to compute: whole copies would be many megabytes."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, _BAND):
        band = image.crop((0, top, image.width, min(top + _BAND, image.height)))
        whole.paste(_rgb_band(band), (0, top))
    return whole


def _rgb_band(band: Image.Image) -> Image.Image:
    if band.mode.startswith("I"):  # 16 bits of gray, which Pillow would clip at 255
        gray = np.asarray(band).astype(np.uint32).clip(0, 65535)
        return Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if band.has_transparency_data:
        layer = band.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return band.convert("RGB")
