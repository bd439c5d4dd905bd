"""Bits a channel of an image file, read from its header: Pillow gives many deep images as 8 bits without a word.

A PNG of 16 bits RGB loses its lower byte, so that reflectances of 300 to 3000 become 1 to 11 of 255; a TIFF of 12 bits
or a JPEG 2000 of 16 is shifted. Sources: PNG specification, 11.2.2 (IHDR); TIFF 6.0, section 2 and tag 258, and
BigTIFF; ISO/IEC 10918-1, B.2.2 (SOF); ISO/IEC 15444-1, A.5.1 (SIZ) and I.4 (boxes).
"""

from __future__ import annotations

import struct

MOST_CHANNELS = 4096
"""Channels whose depth is read; hyperspectral images have some hundreds."""
BITS_PER_SAMPLE = 258
_TIFF_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""struct's letter for the TIFF types of whole numbers."""


def bits(content: bytes) -> int | None:
    """Most bits that a channel of this image has, as its header says; None if it says nothing that can be read."""
    try:
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            place = content.index(b"IHDR", 8)
            return content[place + 12]
        if content[:2] in (b"II", b"MM") and (42 in content[2:4] or 43 in content[2:4]):
            return _of_tiff(content)
        if content.startswith(b"\xff\xd8"):
            return _of_jpeg(content)
        if content.startswith((b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ")):
            return _of_jpeg2000(content)
    except (struct.error, IndexError, ValueError, OverflowError):  # the last: a place beyond 2^63 in a BigTIFF
        return None
    return None


def _of_tiff(content: bytes) -> int:
    order = "<" if content.startswith(b"II") else ">"
    big = 43 in content[2:4]
    offset_type, count_type, entry, room = ("Q", "Q", 20, 8) if big else ("I", "H", 12, 4)
    (start,) = struct.unpack_from(order + offset_type, content, 8 if big else 4)
    (number,) = struct.unpack_from(order + count_type, content, start)
    start += struct.calcsize(count_type)
    for place in range(start, min(start + number * entry, len(content)), entry):
        tag, kind = struct.unpack_from(order + "HH", content, place)
        if tag == BITS_PER_SAMPLE:
            (count,) = struct.unpack_from(order + offset_type, content, place + 4)
            form = f"{order}{min(count, MOST_CHANNELS)}{_TIFF_TYPES.get(kind, 'H')}"
            values = place + 4 + room  # after tag, type and count, which has the width of an offset
            if struct.calcsize(form) > room:
                (values,) = struct.unpack_from(order + offset_type, content, values)
            return int(max(struct.unpack_from(form, content, values)))
    return 1


def _of_jpeg(content: bytes) -> int:
    place = 2
    while True:
        while content[place] == 0xFF and content[place + 1] == 0xFF:  # fill bytes
            place += 1
        marker = content[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return content[place + 4]
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if content[place] != 0xFF:
            raise ValueError("no marker where one must be")


def _of_jpeg2000(content: bytes) -> int:
    start = 0 if content.startswith(b"\xff\x4f") else _box(content, b"jp2c")
    (channels,) = struct.unpack_from(">H", content, start + 40)
    depths = content[start + 42 : start + 42 + 3 * channels : 3]
    return max((depth & 0x7F) + 1 for depth in depths)


def _box(content: bytes, kind: bytes) -> int:
    """Where the content of the first JPEG 2000 box of this kind begins."""
    place = 0
    while place + 8 <= len(content):
        size, header = int.from_bytes(content[place : place + 4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(content[place + 8 : place + 16], "big"), 16
        if content[place + 4 : place + 8] == kind:
            return place + header
        if size < header:  # 0: to the end of the file
            break
        place += size
    raise ValueError(f"no box {kind!r}")
