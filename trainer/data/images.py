"""Image files, opened safely, decoded whole, upright, as RGB. Needs Pillow alone.

Pixels are those that the checkpoint's own Hugging Face processor would take (`convert_to_rgb` of Transformers 5.23:
what is transparent shows white), of an image turned as its EXIF data say: viewers, Hugging Face's ImageFolder and
Transformers' `load_image` do so too.
"""

from __future__ import annotations

import hashlib
import io
import logging
import stat
import struct
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from trainer.common.errors import DataError
from trainer.data import depth

MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs. Pillow warns above it; here such an image is an error."""
MAX_FILE_BYTES = 1 << 30
"""No image of `MAX_PIXELS` needs a larger file; a larger one is not read into memory."""


def open_image(path: Path) -> Image.Image:
    """The whole image, decoded, upright, as RGB (some RSICap images are panchromatic).

    Raises:
        DataError: missing, unreadable, truncated, or more than `MAX_PIXELS`. Never replaced by a black one.
    """
    try:
        return decode(content_of(path)).image
    except IMAGE_ERRORS as error:
        raise DataError(f"{path}: {problem_of(error)}") from error


class _Unusable(ValueError):
    """An image that must not be read although Pillow would; the message continues 'the image ...'."""


IMAGE_ERRORS = (
    *(OSError, EOFError, ValueError, SyntaxError, MemoryError, RuntimeError, struct.error, IndexError, TypeError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""Errors that a broken file can raise, in the file system or in Pillow's format plugins (found by mutating files)."""
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000")
"""Formats read here. They are named since Pillow has others that start programs (EPS: Ghostscript)."""
POINTERS = {
    b"version https://git-lfs.github.com/spec/": "git lfs pull",
    b"/annex/objects/": "git annex get",
}
"""How a file begins that stands for an image which was not downloaded, and the command that downloads it."""
CONVERT = "gdal_translate -ot Byte -scale LOW HIGH 0 255 IN OUT, or convert IN -level LOW,HIGH -depth 8 OUT"
"""Commands that make 8 bits of more. LOW and HIGH are to be the same for all images: stretched one by one, a dark tile
would look like a bright one."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation (tag 0x0112; JEITA CP-3451, 4.6.4 A)."""
SIDEWAYS = (5, 6, 7, 8)
"""Those that exchange width and height."""
CELL = 4
"""Fewest pixels a side that a cell's mean is taken of: with 2 it is up to 17 levels off where colours are
subsampled."""
_SIGNS = (b"Exif", b"eXIf", b"EXIF", b"Raw profile type", b"XML:com.adobe.xmp", b"tiff:Orientation")
"""One of these is in every file with an orientation, except TIFF, where Pillow turns the image by itself."""
_FILTERS = threading.Lock()
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it raises whatever it logs about a broken file


def content_of(path: Path) -> bytes:
    """The file's bytes, if it is a regular file of sane size: reading a pipe would block, a device never end."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError
    if not stat.S_ISREG(status.st_mode):
        raise _Unusable("is not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise _Unusable(f"has {status.st_size} bytes (limit {MAX_FILE_BYTES})")
    return path.read_bytes()


@dataclass(frozen=True)
class Decoded:
    """An image as a model takes it, and what was done to its pixels."""

    image: Image.Image
    """RGB, upright."""
    size: tuple[int, int]
    """Width and height of the whole image, upright; those of `image` are smaller if it was decoded so."""
    orientation: int
    """1 if it lay upright; else a key of `TURNS`."""
    transparent: bool
    """Some of its pixels were not opaque and are mixed with white now."""


def decode(content: bytes, cells: int | None = None) -> Decoded:
    """The bytes of an image file, decoded.

    Args:
        content: the file's bytes.
        cells: only the means of so many cells a side are wanted: a JPEG comes out smaller, by a half, a quarter or an
            eighth, if whole pixels still make up a cell, at least `CELL` a side. All of its bytes are read, and a
            broken one is found; the means are the same to two levels.

    Raises:
        one of IMAGE_ERRORS: see `problem_of`.
    """
    for start, fetch in POINTERS.items():
        if content.startswith(start):
            raise _Unusable(f"was not fetched: the file is a pointer to it; {fetch}")
    deepest = depth.bits(content)
    if deepest is not None and deepest > 8:
        raise _too_deep(f"{deepest} bits")
    image = _opened(content)
    if image.mode.startswith(("I", "F")):  # no header said so
        raise _too_deep(f"mode {image.mode}")
    width, height = image.size
    smaller = 1 if cells is None or image.format != "JPEG" else _smaller(width, height, cells)
    if smaller > 1:
        image.draft(None, (width // smaller, height // smaller))
    image.load()  # first: a PNG's EXIF data may follow its pixels
    orientation = _orientation(image)
    transparent = False
    rgb: Image.Image
    if _has_alpha(image):
        rgba = image.convert("RGBA")
        lowest, _ = rgba.getchannel("A").getextrema()
        transparent = lowest != 255
        if transparent:
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
        rgb = rgba.convert("RGB")
    else:
        rgb = image.convert("RGB")
    if orientation in TURNS:
        rgb = rgb.transpose(TURNS[orientation])
    size = rgb.size
    if smaller > 1:
        size = (height, width) if orientation in SIDEWAYS else (width, height)
    return Decoded(rgb, size, orientation, transparent)


def _smaller(width: int, height: int, cells: int) -> int:
    """By how much a JPEG may be decoded smaller."""
    for by in (8, 4, 2):
        if not (width % (by * cells) or height % (by * cells)) and min(width, height) >= by * cells * CELL:
            return by
    return 1


def identity(content: bytes, decoded: Decoded | None = None) -> str:
    """Hash of the file's bytes, and of how they are read where that has changed: its pixels are known by it.

    Before images were turned upright and transparency shown white, the hash was that of the bytes. It still is for all
    others, so that their fingerprints and kept vision outputs stay valid.

    Args:
        content: the file's bytes.
        decoded: the same, if at hand. Without it only headers are read, and every image that might be transparent is
            taken for one that is.
    """
    digest = hashlib.sha256(content)
    if decoded is not None:
        orientation, transparent = decoded.orientation, decoded.transparent
    else:
        orientation, transparent = _changes(content)
    if orientation in TURNS:
        digest.update(f"orientation {orientation}".encode())
    if transparent:
        digest.update(b"on white")
    return digest.hexdigest()


def _changes(content: bytes) -> tuple[int, bool]:
    """(orientation, whether there may be transparency), without decoding an image that plainly has neither."""
    plain = content.startswith(b"\xff\xd8") or (
        content.startswith(b"\x89PNG") and content[25:26] in b"\0\2\3" and b"tRNS" not in content
    )
    if plain and not any(sign in content for sign in _SIGNS):
        return 1, False
    try:
        image = _opened(content)
        return (1 if image.format == "TIFF" else _orientation(image)), _has_alpha(image)
    except IMAGE_ERRORS:  # whoever decodes it will say
        return 1, False


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or image.info.get("transparency") is not None


def _opened(content: bytes) -> Image.Image:
    """The image with its header read and its pixels not yet."""
    # Pillow warns about what is refused below. The lock: warning filters are global to all threads.
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or where it cannot be read: such images are shown as they lie."""
    try:
        with _FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except IMAGE_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _too_deep(found: str) -> _Unusable:
    # Pillow would clip or shift the samples: a panchromatic image would turn white, a satellite's colours black.
    return _Unusable(f"has more than 8 bits a channel ({found}); convert it to 8 bits first: {CONVERT}")


def problem_of(error: BaseException) -> str:
    """One of IMAGE_ERRORS as a sentence about the image."""
    match error:
        case FileNotFoundError():
            return "the image is missing"
        case IsADirectoryError():
            return "the image is a folder"
        case PermissionError():
            return "the image may not be read (permission denied)"
        case MemoryError():
            return "the image does not fit into memory"
        case _Unusable():
            return f"the image {error}"
        case Image.DecompressionBombError():
            return f"the image is too large and might be a decompression bomb (limit {MAX_PIXELS} pixels)"
        case UnidentifiedImageError():
            return f"the file is not an image in one of the formats read here ({', '.join(FORMATS)})"
    text = str(error)
    if "truncated" in text or "Truncated" in text:
        return "the image is truncated"
    return f"the image is broken ({text or type(error).__name__})"
