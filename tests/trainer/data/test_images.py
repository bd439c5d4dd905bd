"""Pixels are those that the checkpoint's own processor takes, upright; more than 8 bits a channel is refused."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from transformers import InstructBlipProcessor

from trainer.common.errors import DataError
from trainer.data import dataset, depth, duplicates
from trainer.data.batches import Pixels
from trainer.data.features import compute_or_open
from trainer.data.images import decode, identity, open_image
from trainer.data.paths import Names
from trainer.mini import CHECKPOINT
from trainer.model.base import load_base

ORIENTATION = 0x0112


def noise(width: int, height: int, channels: int, dtype: Any = np.uint8, top: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, top, (height, width, channels)).astype(dtype)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def deep_png(colour_type: int, bits: int = 16) -> bytes:
    """A PNG whose samples have 16 bits, by hand: Pillow writes grey ones only."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    pixels = noise(8, 6, channels, ">u2", 3000)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 6, bits, colour_type, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def tiff(pixels: np.ndarray, *, order: str = "<", planar: bool = False, big: bool = False) -> bytes:
    """An uncompressed TIFF of one strip a plane, as tifffile would write it; BigTIFF if `big`."""
    height, width, channels = pixels.shape
    bits, kind = pixels.dtype.itemsize * 8, {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    planes = np.moveaxis(pixels, 2, 0) if planar else pixels[None]
    data = planes.astype(pixels.dtype.newbyteorder(order)).tobytes()
    strips, size = len(planes), len(data) // len(planes)
    wide, entry, start = ("Q", 20, 16) if big else ("I", 12, 8)
    tags: list[tuple[int, str, list[int]]] = [
        (256, "H", [width]),
        (257, "H", [height]),
        (258, "H", [bits] * channels),
        (259, "H", [1]),
        (262, "H", [2 if channels >= 3 else 1]),
        (273, wide, [0] * strips),
        (277, "H", [channels]),
        (278, "H", [height]),
        (279, wide, [size] * strips),
        (284, "H", [2 if planar else 1]),
        (339, "H", [kind] * channels),
    ]
    count = struct.calcsize("Q" if big else "H")
    room = struct.calcsize(wide)
    extra_at = start + count + len(tags) * entry + room
    extra, directory = b"", b""
    sizes = [struct.calcsize(f"={len(v)}{t}") for _, t, v in tags]
    data_at = extra_at + sum(s for s in sizes if s > room)
    for tag, letter, values in tags:
        numbers = [data_at + i * size for i in range(strips)] if tag == 273 else values
        packed = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(packed) > room:
            place, extra = extra_at + len(extra), extra + packed
            packed = struct.pack(order + wide, place)
        number = {"H": 3, "I": 4, "Q": 16}[letter]
        directory += struct.pack(order + "HH" + wide, tag, number, len(numbers)) + packed.ljust(room, b"\0")
    mark = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    mark += struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "I", 8)
    return mark + struct.pack(order + ("Q" if big else "H"), len(tags)) + directory + b"\0" * room + extra + data


def with_byte(content: bytes, place: int, value: int) -> bytes:
    return content[:place] + bytes([value]) + content[place + 1 :]


def jpeg_of_12_bits() -> bytes:
    content = saved(Image.new("RGB", (8, 8)), "JPEG")
    return with_byte(content, content.index(b"\xff\xc0") + 4, 12)


def jpeg2000_of_16_bits(*, boxes: bool) -> bytes:
    content = saved(Image.new("RGB", (32, 32)), "JPEG2000", no_jp2=not boxes)
    return with_byte(content, content.index(b"\xff\x4f\xff\x51") + 42 + 3, 15)  # the second channel


U2, RGB16 = np.uint16, noise(8, 6, 3, np.uint16, 3000)
DEEP = {
    **{f"png {name}": deep_png(kind) for name, kind in (("grey", 0), ("rgb", 2), ("grey and alpha", 4), ("rgba", 6))},
    **{
        f"tiff {order} planar={planar} big={big}": tiff(RGB16, order=order, planar=planar, big=big)
        for order in "<>"
        for planar in (False, True)
        for big in (False, True)
    },
    "tiff grey": tiff(noise(8, 6, 1, U2, 3000)),
    "tiff of four bands": tiff(noise(8, 6, 4, U2, 3000)),
    "tiff of 150 bands": tiff(noise(8, 6, 150, U2, 3000)),
    "tiff of floats": tiff(noise(8, 6, 1).astype(np.float32)),
    "tiff of three floats": tiff(noise(8, 6, 3).astype(np.float32)),
    "tiff of doubles": tiff(noise(8, 6, 1).astype(np.float64)),
    "tiff int16": tiff(noise(8, 6, 1, np.int16, 3000)),
    "tiff int32": tiff(noise(8, 6, 1, np.int32, 3000)),
    **{
        f"{mode} as {kind}": saved(Image.new(mode, (8, 6), 700), kind)
        for mode, kind in (("I;16", "PNG"), ("I", "TIFF"))
    },
    **{f"I;16 as {kind}": saved(Image.new("I;16", (32, 32), 700), kind) for kind in ("TIFF", "JPEG2000")},
    "I;16B": saved(Image.new("I;16B", (8, 6), 700), "TIFF"),
    "jpeg": jpeg_of_12_bits(),
    "jpeg2000": jpeg2000_of_16_bits(boxes=True),
    "jpeg2000 codestream": jpeg2000_of_16_bits(boxes=False),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_a_channel_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "deep.img").write_bytes(DEEP[name])
    with pytest.raises(DataError) as caught:
        open_image(tmp_path / "deep.img")
    message = str(caught.value)
    assert "deep.img: the image has more than 8 bits a channel (" in message
    assert "convert it to 8 bits first: gdal_translate -ot Byte -scale LOW HIGH 0 255 IN OUT" in message


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiffs_of_8_bits_are_taken(channels: int, planar: bool, big: bool) -> None:
    pixels = noise(8, 6, channels)
    taken = np.asarray(decode(tiff(pixels, planar=planar, big=big)).image)
    assert (taken == pixels).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_depth_of_usual_files_is_8_or_not_said(kind: str, mode: str) -> None:
    content = saved(Image.new(mode, (32, 32)), kind)
    assert depth.bits(content) == (None if kind in ("WEBP", "BMP", "GIF") else 8)
    assert decode(content).image.mode == "RGB"


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(DEEP.values())), st.data())
def test_a_broken_header_is_not_a_crash(content: bytes, data: st.DataObject) -> None:
    broken = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, min(len(broken), 300) - 1))] = data.draw(st.integers(0, 255))
    found = depth.bits(bytes(broken[: data.draw(st.integers(0, len(broken)))]))
    assert found is None or found >= 0


@pytest.mark.parametrize("at", [8, 16])
def test_a_bigtiff_that_points_beyond_any_file_says_nothing(at: int) -> None:
    broken = bytearray(tiff(RGB16, big=True))
    broken[at : at + 8] = b"\xff" * 8
    assert depth.bits(bytes(broken)) in (None, 16)
    assert depth.bits(b"II+\x00\x08\x00\x00\x00" + b"\xff" * 8) is None


def other_mode(mode: str) -> Image.Image:
    """An image of this mode, with all of its values and, where it can have some, with transparent pixels."""
    colours = Image.fromarray(noise(40, 24, 3))
    if mode == "P, transparent":
        image = colours.quantize(16)
        image.info["transparency"] = 3
        return image
    if mode == "P, translucent":
        image = colours.quantize(16)
        image.info["transparency"] = bytes(range(0, 256, 16))
        return image
    if mode in ("RGB, transparent", "L, transparent"):
        image = colours.convert(mode.partition(",")[0])
        image.info["transparency"] = image.getpixel((0, 0))
        return image
    if mode in ("RGBA", "LA"):
        return Image.fromarray(noise(40, 24, 4)).convert(mode)
    return colours.convert(mode)


KEPT = {
    "PNG": (
        "RGB",
        "RGBA",
        "LA",
        "L",
        "1",
        "P",
        "P, transparent",
        "P, translucent",
        "RGB, transparent",
        "L, transparent",
    ),
    "GIF": ("L", "P", "P, transparent"),
    "WEBP": ("RGB", "RGBA"),
    "JPEG": ("RGB", "L", "CMYK"),
    "TIFF": ("RGB", "RGBA", "LA", "L", "1", "P", "CMYK", "YCbCr"),
    "BMP": ("RGB", "L", "1", "P"),
}


@pytest.fixture(scope="module")
def processor() -> Any:
    return InstructBlipProcessor.from_pretrained(CHECKPOINT).image_processor


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in KEPT.items() for mode in modes])
def test_every_kind_of_pixel_gives_what_the_checkpoints_processor_gives(kind: str, mode: str, processor: Any) -> None:
    content = saved(other_mode(mode), kind)
    theirs = processor(images=Image.open(io.BytesIO(content)), return_tensors="pt")["pixel_values"]
    ours = processor(images=decode(content).image, return_tensors="pt")["pixel_values"]
    assert torch.equal(ours, theirs)


def oriented(kind: str, turn: int) -> bytes:
    """A picture of 40 x 20 with this EXIF orientation."""
    picture = Image.fromarray(np.kron(noise(5, 3, 3), np.ones((8, 8, 1), np.uint8))).crop((0, 0, 40, 20))
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    return saved(picture, kind, exif=exif)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_upright(kind: str, turn: int) -> None:
    content = oriented(kind, turn)
    upright = decode(content).image
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert upright.size == ((40, 20) if turn < 5 else (20, 40))
    assert (np.asarray(upright) == np.asarray(expected)).all()


def test_orientation_6_is_a_quarter_clockwise() -> None:
    """JEITA CP-3451: row 0 is the visual right side, column 0 the visual top."""
    picture = Image.new("RGB", (40, 20))
    picture.paste((255, 0, 0), (0, 0, 40, 4))  # row 0
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    upright = decode(saved(picture, "PNG", exif=exif)).image
    assert upright.size == (20, 40)
    assert upright.getpixel((19, 20)) == (255, 0, 0)
    assert upright.getpixel((0, 20)) == (0, 0, 0)


@pytest.mark.parametrize("turn", [0, 9, 65535])
def test_orientations_that_mean_nothing_turn_nothing(turn: int) -> None:
    content = oriented("JPEG", turn)
    assert decode(content).image.size == (40, 20)
    assert identity(content) == hashlib.sha256(content).hexdigest()


def test_broken_exif_data_are_ignored() -> None:
    for junk in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + b"\xff" * 40):
        content = saved(Image.new("RGB", (40, 20)), "JPEG", exif=junk)
        assert decode(content).image.size == (40, 20)
        assert identity(content) == hashlib.sha256(content).hexdigest()


def test_an_orientation_in_xmp_counts_too() -> None:
    """Pillow reads it there as well, and so does `exif_transpose`."""
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x><rdf tiff:Orientation="6"/></x>', zip=True)
    content = saved(Image.new("RGB", (40, 20)), "PNG", pnginfo=text)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(content))).size == decode(content).image.size == (20, 40)
    assert identity(content) != hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_what_is_kept_of_an_image_is_found_by_its_pixels(kind: str) -> None:
    """Kept outputs and fingerprints of images that were read lying down must not count any more; all others do."""
    plain = hashlib.sha256(oriented(kind, 1)).hexdigest()
    assert identity(oriented(kind, 1)) == plain
    turned = oriented(kind, 6)
    assert (identity(turned) == hashlib.sha256(turned).hexdigest()) == (kind == "TIFF")  # Pillow always turned these


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA"), ("TIFF", "RGBA")])
def test_opaque_images_with_alpha_keep_their_fingerprint(kind: str, mode: str) -> None:
    opaque, see_through = other_mode(mode), other_mode(mode)
    opaque.putalpha(255)
    for image, fingerprint_is_kept in ((opaque, True), (see_through, False)):
        content = saved(image, kind)
        plain = hashlib.sha256(content).hexdigest()
        assert (identity(content, decode(content)) == plain) == fingerprint_is_kept
        if kind != "WEBP" or image is see_through:  # libwebp leaves an opaque channel out
            assert identity(content) != plain, "what is kept of it may have been computed of other pixels"


@pytest.mark.parametrize("mode", ["P, transparent", "RGB, transparent", "L, transparent"])
def test_a_transparent_colour_is_seen_in_the_header(mode: str) -> None:
    content = saved(other_mode(mode), "PNG")
    assert identity(content) == identity(content, decode(content)) != hashlib.sha256(content).hexdigest()


def test_vision_outputs_are_those_of_the_upright_image(tmp_path: Path, tiny_checkpoint: Path) -> None:
    base = load_base(str(tiny_checkpoint), dtype=torch.float32, device=torch.device("cpu"))
    (tmp_path / "lying.jpg").write_bytes(oriented("JPEG", 6))
    open_image(tmp_path / "lying.jpg").save(tmp_path / "upright.png")
    images = [tmp_path / "lying.jpg", tmp_path / "upright.png"]
    features = compute_or_open(tmp_path / "store", base, images, Pixels(base.processor.image_processor))
    lying, upright = (features.take(torch.tensor([features.index(image)])) for image in images)
    assert torch.equal(lying, upright)


@pytest.mark.parametrize(
    ("size", "by"), [((224, 224), 2), ((512, 1024), 8), ((256, 448), 4), ((250, 224), 1)], ids=str
)
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_look_at_a_jpeg_sees_what_the_whole_of_it_shows(
    size: tuple[int, int], by: int, orientation: int, subsampling: int
) -> None:
    """Its size, and the picture's sketch to within two levels; a file that is cut is found all the same."""
    coarse = Image.fromarray(np.random.default_rng(by).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    large = coarse.resize(size, Image.Resampling.BICUBIC)
    content = saved(large, "JPEG", exif=exif, quality=90, subsampling=subsampling)
    whole, look = decode(content), decode(content, cells=duplicates.SIZE)
    assert whole.size == look.size == whole.image.size
    assert look.image.size == tuple(side // by for side in look.size)
    one, other = (
        np.frombuffer(duplicates.picture(each.image, "", each.size).sketch, np.uint8).astype(int)
        for each in (whole, look)
    )
    assert abs(one - other).max() <= 2
    for cells in (None, duplicates.SIZE):
        with pytest.raises(OSError, match="truncated"):
            decode(content[: len(content) * 2 // 3], cells)


def test_a_ship_on_a_dark_sea_is_seen_at_a_look(tmp_path: Path) -> None:
    """A few pixels that a smaller picture does not show: it is not of one colour."""
    sea = Image.new("RGB", (1024, 1024), (8, 8, 8))
    sea.paste((200, 200, 200), (500, 500, 503, 503))
    sea.save(tmp_path / "sea.jpg", quality=95)
    _, found, problem = dataset._look(tmp_path / "sea.jpg", Names(tmp_path))
    assert not problem and found is not None and not found.plain and (found.width, found.height) == (1024, 1024)
