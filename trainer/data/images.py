"""Image files, opened safely, decoded whole, as RGB. Needs Pillow alone."""

from __future__ import annotations

import io
import logging
import stat
import struct
import threading
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from trainer.common.errors import DataError

MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs. Pillow warns above it; here such an image is an error."""
MAX_FILE_BYTES = 1 << 30
"""No image of `MAX_PIXELS` needs a larger file; a larger one is not read into memory."""


def open_image(path: Path) -> Image.Image:
    """The whole image, decoded, as RGB (some RSICap images are panchromatic).

    Raises:
        DataError: missing, unreadable, truncated, or more than `MAX_PIXELS`. Never replaced by a black one.
    """
    try:
        return decode(content_of(path))
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


def decode(content: bytes) -> Image.Image:
    """The bytes of an image file as RGB.

    Raises:
        one of IMAGE_ERRORS: see `problem_of`.
    """
    # Opening reads the header alone; Pillow warns there about what is refused below. The lock: warning filters are
    # global to all threads.
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if image.mode.startswith(("I", "F")):
        # Pillow would clip 16-bit samples to 8 bits: a panchromatic image would turn white.
        raise _Unusable(f"has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits first")
    return image.convert("RGB")


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
