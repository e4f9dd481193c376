"""Images as they come over the wire, to pixels and back. Whatever is sent, time and memory stay bounded.

JPEG, PNG, WebP and BMP are read. The EXIF orientation is applied and transparency is laid on white; CMYK, grayscale,
palette and 16-bit images become 8-bit RGB without colour management. Animations are refused: which frame was meant is
anyone's guess.
"""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_SIDE = 20_000
MAX_PIXELS = 25_000_000
MAX_JPEG_PIXELS = 64_000_000  # JPEG can be decoded at a fraction of its size, so larger ones are affordable
MAX_JPEG_SCANS = 100  # each scan of a progressive JPEG visits every pixel; cameras write about ten
_FULL_DECODE_PIXELS = 4_000_000


class ImageError(ValueError):
    """These bytes are not an image that can be answered; the message is ASCII and fit for the client."""


def decode(data: bytes, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The image in ``data`` as uint8 (H, W, 3) with ``size`` = (H, W).

    An image of another size is resized, bilinear with antialiasing and without keeping its aspect ratio, as for the
    training of the classifiers; one of that very size keeps its pixels untouched.

    Raises:
        ImageError: not an image of the four formats, too large, animated, truncated or damaged.
    """
    if not data:
        raise ImageError("no image: the body is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
        _check_header(image, data)
        return _pixels(image, size)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not a JPEG, PNG, WebP or BMP image") from None
    except (Image.DecompressionBombError, MemoryError):
        raise ImageError(f"the image is too large: at most {MAX_PIXELS} pixels are accepted") from None
    except Exception:  # decoders raise nearly anything on hostile bytes
        raise ImageError("the image is truncated or damaged") from None


def encode_png(image: npt.NDArray[np.float32]) -> bytes:
    """A PNG of float (3, H, W), nominally in [0, 1]; what lies outside is clipped."""
    pixels = np.rint(image.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
    return stream.getvalue()


def _check_header(image: Image.Image, data: bytes) -> None:
    """Refuse by what the header says, before a single pixel is decoded."""
    width, height = image.size
    is_jpeg = image.format in ("JPEG", "MPO")  # MPO: a JPEG photo with a second picture behind it, as phones make them
    limit = MAX_JPEG_PIXELS if is_jpeg else MAX_PIXELS
    if max(width, height) > MAX_SIDE or width * height > limit:
        raise ImageError(f"the image is too large: {width}x{height}, at most {limit} pixels are accepted")
    if is_jpeg and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise ImageError(f"the JPEG has too many scans: at most {MAX_JPEG_SCANS} are accepted")
    if not is_jpeg and getattr(image, "is_animated", False):
        raise ImageError("the image is animated: send one frame")


def _pixels(image: Image.Image, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    height, width = size
    if image.width * image.height > _FULL_DECODE_PIXELS:
        # For JPEG: decode at 1/2, 1/4 or 1/8, but never below twice the wanted size, where antialiasing still decides.
        side = 2 * max(size)
        image.draft(image.mode, (side, side))
    image = _rgb(_upright(image))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the picture
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of gray, which Pillow would clip at 255
        gray = np.asarray(image).astype(np.uint32).clip(0, 65535)
        return Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
