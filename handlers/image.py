"""Decode and encode images of clients, with bounded time and memory whatever they send.

JPEG, PNG, WebP and BMP are read. The EXIF orientation is applied and transparent pixels are blended with white; CMYK,
grayscale, palette and 16-bit images become 8-bit RGB without colour management. Refused are animations, since it is
unclear which frame is meant, and images whose header shows that they need far more time or memory than ordinary ones.
"""

import contextlib
import io
import struct
import threading

import numpy as np
from PIL import Image, ImageChops, ImageFile

from handlers.arrays import FloatArray, Pixels
from handlers.metadata import DamagedError, ImageError, Stripped, has_all_rows, strip_metadata

__all__ = ["FORMATS", "ImageError", "Pixels", "decode", "encode_png", "format_of", "is_costly"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_SIDE = 20_000
MAX_PIXELS = 16_777_216  # WebP takes 16 bytes for each while it is decoded
MAX_JPEG_PIXELS = 64_000_000  # in one scan; such a JPEG can be decoded at a reduced size
MAX_JPEG_SCANS = 100  # cameras write about ten
MAX_JPEG_SAMPLES = 300_000_000  # in all scans together: 16 million pixels without subsampling need 235 million
MAX_LOSSLESS_PIXELS = 2_097_152  # of a WebP, or of its opacity: every 16 pixels can ask for 5 kB of tables
MAX_RLE_PIXELS = 131_072  # of a run-length encoded BMP, which Pillow decodes in Python
_FULL_DECODE_PIXELS = 4_000_000
_UNREAD_BMP = "this kind of BMP is not read: save it with 24 bits and without compression, or as PNG"
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
_ONE_LARGE = threading.Lock()  # parallel decoders hold only one large image at a time
_JPEG_END = b"\xff\xd9"
# A marker that the decoder sees where the data of a scan should continue, or after a restart marker.
_NO_END = [b"".join(bits * 16 + bytes((0xFF, 0xD0 + i)) for i in range(8)) for bits in (b"\xfe\xaa", b"\x55\x33")]
_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\0\0\1\0": "ICO",
    b"%PDF": "PDF",
    b"\x1f\x8b": "gzip",
    b"PK\3\4": "ZIP",
}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"
)


def format_of(data: bytes | bytearray) -> str | None:
    """The format of ``data`` by its first bytes: one of the four, or a few others."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brands = [bytes(data[place : place + 4]) for place in (8, *range(16, 64, 4))]
        return next((_BRANDS[brand] for brand in sorted(brands) if brand in _BRANDS), "MP4")
    return next((name for start, name in _SIGNATURES.items() if data.startswith(start)), None)


def decode(image: bytes | Pixels, size: tuple[int, int], images_in_request: int = 1) -> Pixels:
    """Decode an encoded image, or take uint8 (H, W, 3) as it is, and resize it to ``size`` = (H, W): uint8 (H, W, 3).

    Resizing is bilinear with antialiasing and does not keep the aspect ratio, as in the training of the classifiers. An
    image that has this size already is not changed.

    Args:
        images_in_request: number of images that share the limit of pixels of a single image.

    Raises:
        ImageError: the image has another format, is too large or too costly, animated, truncated or damaged.
    """
    if isinstance(image, np.ndarray):
        return _fitted(Image.fromarray(image), size)
    if not image:
        raise ImageError("no image: the body is empty")
    if (format := format_of(image)) not in FORMATS:
        raise ImageError("not a JPEG, PNG, WebP or BMP image" + (f", but {format}" if format else ""))
    try:
        stripped = strip_metadata(image)
        opened = _open(stripped.data if stripped.ended else stripped.data.rstrip(b"\xff") + _JPEG_END)
        _check_header(opened, stripped, images_in_request)
        with _ONE_LARGE if _is_large(opened, stripped) else contextlib.nullcontext():
            return _pixels(opened, stripped, size)
    except ImageError:
        raise
    except (Image.DecompressionBombError, MemoryError):
        limit = MAX_PIXELS // images_in_request
        raise ImageError(f"the image is too large: at most {limit} pixels are accepted") from None
    except Exception as error:  # decoders raise almost anything for hostile bytes
        unread = str(error).startswith("Unsupported BMP")
        raise ImageError(_UNREAD_BMP) if unread else DamagedError from None


def is_costly(image: bytes | Pixels, images_in_request: int = 1) -> bool:
    """Whether `decode` takes an image by its header, and much longer for it than for most photographs."""
    if isinstance(image, np.ndarray):
        return False
    try:
        stripped = strip_metadata(image)
        opened = _open(stripped.data)
        _check_header(opened, stripped, images_in_request)
        samples = stripped.scans.samples if stripped.scans else 0
        return samples > 3 * MAX_PIXELS or _is_large(opened, stripped)
    except Exception:  # decoders raise almost anything for hostile bytes
        return False


def encode_png(image: FloatArray) -> bytes:
    """A PNG of float (3, H, W); values are clipped to [0, 1]."""
    pixels = np.rint(image.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
    return stream.getvalue()


def _open(data: bytes) -> ImageFile.ImageFile:
    """The image with its header read, and no pixels decoded yet."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.decodermaxblock = len(data)  # an arithmetic-coded JPEG cannot be decoded in parts
    return image


def _check_header(image: ImageFile.ImageFile, stripped: Stripped, images_in_request: int) -> None:
    """Refuse an image by its header, before pixels are decoded."""
    width, height = image.size
    scans = stripped.scans
    is_rle = image.format == "BMP" and image.tile[0][0] == "bmp_rle"
    if is_rle:
        kind, most = "run-length encoded BMP", MAX_RLE_PIXELS
    elif stripped.lossless:
        kind, most = "lossless or transparent WebP", MAX_LOSSLESS_PIXELS
    else:
        kind, most = "image", MAX_JPEG_PIXELS if scans and scans.at_once else MAX_PIXELS
    limit = most // images_in_request
    if max(width, height) > MAX_SIDE or width * height > limit or (is_rle and len(stripped.data) > 3 * limit):
        among = f" of each of {images_in_request} images" if images_in_request > 1 else ""
        raise ImageError(f"the {kind} is too large: {width}x{height}, at most {limit} pixels{among} are accepted")
    if image.format == "BMP" and _is_misread(image, stripped.data):
        raise ImageError(_UNREAD_BMP)
    if scans and scans.count > MAX_JPEG_SCANS:
        raise ImageError(f"the JPEG has too many scans: at most {MAX_JPEG_SCANS} are accepted")
    if scans and scans.samples > MAX_JPEG_SAMPLES // images_in_request:
        raise ImageError("the scans of the JPEG take too long: scale it down, or save it in one scan (baseline)")
    if image.mode == "P" and not (image.palette and image.palette.palette):  # Pillow would show it in black
        raise ImageError("the image has colours of a palette, but no palette")
    if getattr(image, "is_animated", False):
        raise ImageError("the image is animated: send one frame")


def _is_misread(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether Pillow gives a BMP other pixels than it has: run-length encoded ones of 4 bits, and gray ones where the
    palette is shorter than the bits of a pixel allow.
    """
    bits = data[24 if data[14] == 12 else 28]  # by the length of the header
    is_rle = image.tile[0][0] == "bmp_rle"
    return (is_rle and bits == 4) or {"1": 1, "L": 8}.get(image.mode, bits) != bits


def _is_large(image: Image.Image, stripped: Stripped) -> bool:
    pixels = image.width * image.height * (MAX_PIXELS // MAX_LOSSLESS_PIXELS if stripped.lossless else 1)
    return pixels > _FULL_DECODE_PIXELS and not (stripped.scans and stripped.scans.at_once)


def _pixels(image: Image.Image, stripped: Stripped, size: tuple[int, int]) -> Pixels:
    scans = stripped.scans
    # Some cameras omit the end marker. A decoder silently fills in data missing before it.
    data = stripped.data.rstrip(b"\xff")
    images = [image] if stripped.ended else [_open(data + more + _JPEG_END) for more in _NO_END]
    if scans and not scans.lossless and image.width * image.height > _FULL_DECODE_PIXELS:
        # Decode at 1/2, 1/4 or 1/8, but not below twice the final size, so that antialiasing determines the result.
        for each in images:
            each.draft(each.mode, (2 * max(size),) * 2)
    if scans and not stripped.ended and not scans.complete(data):
        raise DamagedError
    image = images[0]
    if any(other.tobytes() != image.tobytes() for other in images[1:]):
        raise DamagedError
    if image.format == "PNG" and _may_lack_rows(image) and not has_all_rows(stripped.data):
        raise DamagedError
    exif = stripped.exif or image.info.get("exif", b"")
    image = _rgb(image, stripped)
    if (turn := _TURNS.get(_orientation(exif))) is not None:
        image = image.transpose(turn)
    return _fitted(image, size)


def _may_lack_rows(image: Image.Image) -> bool:
    """Whether the last rows of a PNG may be black because its pixel data ended early."""
    last = image.crop((0, image.height - 1, image.width, image.height))
    return bool(image.info.get("interlace")) or not any(last.tobytes())


def _fitted(image: Image.Image, size: tuple[int, int]) -> Pixels:
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, 3)  # asarray takes twice as long


def _orientation(exif: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) if it is missing or damaged."""
    block = exif.removeprefix(b"Exif\0\0")
    order = ">" if block.startswith(b"MM") else "<"
    try:
        (directory,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, directory)
        for place in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", block, place)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(order + {1: "B", 4: "I"}.get(kind, "H"), block, place + 8)
                return int(value)
    except struct.error:
        return 1
    return 1


def _rgb(image: Image.Image, stripped: Stripped) -> Image.Image:
    """8-bit RGB blended with white. Conversions work on bands of rows, since copies of whole images are megabytes."""
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema()[1] == 0:
        return image.convert("RGB")  # the fourth byte is unused
    colour = stripped.transparent
    if image.mode == "RGB" and not colour:
        return image
    lower = _lower_bytes(stripped.data) if len(colour) == 6 else None
    whole = Image.new("RGB", image.size, "white")
    for top in range(0, image.height, _BAND):
        box = (0, top, image.width, min(top + _BAND, image.height))
        band = image.crop(box)
        mask = None
        if len(colour) == 1:
            band = _clear_gray(band, colour[0])
        elif colour:
            mask = _opacity(band, colour[:3])
            if lower:
                mask = ImageChops.lighter(mask, _opacity(lower.crop(box), colour[3:]))
        elif band.mode.startswith("I"):  # 16 bits of gray, which Pillow would clip at 255
            band = _eight_bits(band)
        elif band.has_transparency_data:
            mask = band = band.convert("RGBA")
        whole.paste(band.convert("RGB"), (0, top), mask)
    return whole


def _clear_gray(band: Image.Image, value: int) -> Image.Image:
    """``band`` as 8-bit gray, white where it has the transparent ``value``."""
    if not band.mode.startswith("I"):
        return band.convert("L").point([255 if gray == value else gray for gray in range(256)])
    pixels = np.array(_eight_bits(band))
    pixels[np.asarray(band) == value] = 255
    return Image.fromarray(pixels)


def _opacity(band: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Transparent where ``band`` has the ``colour``."""
    band.info["transparency"] = colour
    return band.convert("RGBA").getchannel("A")


def _eight_bits(band: Image.Image) -> Image.Image:
    gray = np.asarray(band).astype(np.uint32).clip(0, 65535)
    return Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8))


def _lower_bytes(data: bytes) -> Image.Image:
    """The lower byte of every sample of a 16-bit RGB PNG; Pillow returns only the upper bytes."""
    image = _open(data)
    image.tile = [(*image.tile[0][:3], "RGB;16L")]  # type: ignore[list-item]  # plain tuples in older versions
    return image
