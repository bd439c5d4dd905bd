"""Draws a tile from its facts: flat shapes in 128 x 128 pixels, halved to 64 x 64, then given an archive's look.

Coordinates are fractions of the tile, (0, 0) at the top left.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

from trainer.mini.vocabulary import COLOURS, GROUNDS, RGB, Extra, Facts, Region

TILE_PIXELS = 64
"""Side of a tile, which is the embedded model's `image_size`: its processor's resize changes nothing."""
CANVAS_PIXELS = 2 * TILE_PIXELS
"""Side of the drawing before it is halved, which smooths the edges."""

ASPHALT: RGB = (92, 94, 98)
WATER: RGB = (54, 92, 122)
LEAVES: RGB = (38, 72, 40)
LINES: RGB = (232, 232, 226)


@dataclass(frozen=True)
class Look:
    """How an archive's sensor and season change the picture."""

    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors of red, green and blue."""
    bias: tuple[int, int, int] = (0, 0, 0)
    """Added to each channel after the gain, out of 255: haze or a dark exposure."""
    saturation: float = 1.0
    contrast: float = 1.0
    blur: float = 0.0
    """Radius of a Gaussian blur, in pixels of the tile."""
    noise: int = 8
    """Amplitude of the sensor's noise, out of 255."""
    scale: float = 1.0
    """Size of the objects: the ground distance of a pixel."""


class Canvas:
    """A square drawing surface whose coordinates run from 0 to 1."""

    def __init__(self, ground: RGB, rng: random.Random) -> None:
        self.image = Image.new("RGB", (CANVAS_PIXELS, CANVAS_PIXELS), ground)
        self.draw = ImageDraw.Draw(self.image)
        self.rng = rng

    def rectangle(self, x: float, y: float, width: float, height: float, fill: RGB) -> None:
        """Centred on (x, y)."""
        s = CANVAS_PIXELS
        self.draw.rectangle(
            ((x - width / 2) * s, (y - height / 2) * s, (x + width / 2) * s, (y + height / 2) * s), fill=fill
        )

    def ellipse(self, x: float, y: float, width: float, height: float, fill: RGB) -> None:
        """Centred on (x, y)."""
        s = CANVAS_PIXELS
        self.draw.ellipse(
            ((x - width / 2) * s, (y - height / 2) * s, (x + width / 2) * s, (y + height / 2) * s), fill=fill
        )

    def line(self, x0: float, y0: float, x1: float, y1: float, width: float, fill: RGB) -> None:
        s = CANVAS_PIXELS
        self.draw.line((x0 * s, y0 * s, x1 * s, y1 * s), fill=fill, width=max(1, round(width * s)))

    def polygon(self, points: list[tuple[float, float]], fill: RGB) -> None:
        self.draw.polygon([(x * CANVAS_PIXELS, y * CANVAS_PIXELS) for x, y in points], fill=fill)


def shade(colour: RGB, factor: float) -> RGB:
    """The colour made darker (factor below 1) or lighter."""
    red, green, blue = (min(255, max(0, round(c * factor))) for c in colour)
    return red, green, blue


# --- grounds: each kind of scene without its objects -----------------------------------------------------


def _speckle(c: Canvas, colour: RGB) -> None:
    """Patches and tufts, so that no ground is flat."""
    for _ in range(14):
        x, y = c.rng.random(), c.rng.random()
        width, height = 0.05 + 0.2 * c.rng.random(), 0.05 + 0.15 * c.rng.random()
        c.ellipse(x, y, width, height, shade(colour, c.rng.uniform(0.93, 1.07)))


def _woods(c: Canvas, colour: RGB) -> None:
    for _ in range(70):
        size = c.rng.uniform(0.05, 0.1)
        c.ellipse(c.rng.random(), c.rng.random(), size, size, shade(colour, c.rng.uniform(0.7, 1.3)))


def _airport(c: Canvas, _: RGB) -> None:
    c.line(0.0, 0.12, 1.0, 0.88, 0.13, (128, 130, 134))
    for i in range(8):
        t = 0.03 + i / 8
        c.line(t, 0.12 + 0.76 * t, t + 0.05, 0.12 + 0.76 * (t + 0.05), 0.016, LINES)


def _harbor(c: Canvas, _: RGB) -> None:
    c.rectangle(0.5, 0.54, 0.84, 0.9, WATER)
    for x in (0.22, 0.5, 0.78):
        c.rectangle(x, 0.16, 0.035, 0.16, (176, 170, 160))


def _parking(c: Canvas, _: RGB) -> None:
    c.rectangle(0.5, 0.5, 0.86, 0.86, ASPHALT)
    for row in (0.1, 0.36, 0.62, 0.88):
        for i in range(13):
            c.line(0.08 + 0.07 * i, row - 0.025, 0.08 + 0.07 * i, row + 0.025, 0.008, LINES)


def _tanks(c: Canvas, _: RGB) -> None:
    for x in (0.34, 0.66):
        c.line(x, 0.08, x, 0.92, 0.018, (92, 84, 78))
    c.line(0.08, 0.5, 0.92, 0.5, 0.018, (92, 84, 78))


def _tennis(c: Canvas, _: RGB) -> None:
    c.rectangle(0.5, 0.5, 0.86, 0.86, (196, 188, 168))
    c.line(0.07, 0.5, 0.93, 0.5, 0.012, (120, 116, 104))


def _farmland(c: Canvas, colour: RGB) -> None:
    for i in range(16):
        x = i / 16
        c.rectangle(x + 1 / 32, 0.5, 1 / 32, 1.0, shade(colour, 1.18 if i % 4 else 0.8))


def _residential(c: Canvas, _: RGB) -> None:
    for t in (0.06, 0.5, 0.94):
        c.line(t, 0.0, t, 1.0, 0.035, (150, 150, 150))
    c.line(0.0, 0.5, 1.0, 0.5, 0.035, (150, 150, 150))


def _intersection(c: Canvas, _: RGB) -> None:
    c.rectangle(0.5, 0.5, 0.26, 1.0, ASPHALT)
    c.rectangle(0.5, 0.5, 1.0, 0.26, ASPHALT)
    for i in range(10):
        if i not in (4, 5):
            c.line(0.5, i / 10 + 0.02, 0.5, i / 10 + 0.06, 0.014, LINES)
            c.line(i / 10 + 0.02, 0.5, i / 10 + 0.06, 0.5, 0.014, LINES)


def _railway(c: Canvas, _: RGB) -> None:
    for i in range(7):
        y = 0.14 + 0.12 * i
        c.line(0.0, y, 1.0, y, 0.05, (112, 100, 90))
        c.line(0.0, y, 1.0, y, 0.014, (58, 54, 52))


def _beach(c: Canvas, _: RGB) -> None:
    for i in range(3):
        c.polygon(
            [(0.72 + 0.06 * i, 0.0), (1.0, 0.0), (1.0, 1.0), (0.86 + 0.06 * i, 1.0)],
            ((224, 228, 224), (92, 148, 164), WATER)[i],
        )


def _industry(c: Canvas, _: RGB) -> None:
    c.rectangle(0.5, 0.5, 0.9, 0.07, ASPHALT)
    c.rectangle(0.5, 0.5, 0.07, 0.9, ASPHALT)
    for x in (0.08, 0.92):
        c.rectangle(x, 0.5, 0.03, 0.7, (132, 128, 124))


def _park(c: Canvas, _: RGB) -> None:
    for size in (0.8, 0.34):
        edge = (0.5 - size / 2) * CANVAS_PIXELS, (0.5 + size / 2) * CANVAS_PIXELS
        c.draw.ellipse((edge[0], edge[0], edge[1], edge[1]), outline=(206, 190, 158), width=4)
    c.line(0.1, 0.1, 0.9, 0.9, 0.025, (206, 190, 158))


_SCENERY: dict[str, Callable[[Canvas, RGB], None]] = {
    "airport": _airport, "harbor": _harbor, "parking": _parking, "tanks": _tanks, "tennis": _tennis,
    "farmland": _farmland, "residential": _residential, "intersection": _intersection, "railway": _railway,
    "beach": _beach, "industry": _industry, "park": _park,
}  # fmt: skip


# --- objects, which are counted ---------------------------------------------------------------------------------


def _plane(c: Canvas, x: float, y: float, k: float, fill: RGB) -> None:
    c.line(x, y - 0.085 * k, x, y + 0.085 * k, 0.032 * k, fill)
    c.polygon([(x - 0.085 * k, y + 0.03 * k), (x, y - 0.035 * k), (x + 0.085 * k, y + 0.03 * k)], fill)
    c.rectangle(x, y + 0.078 * k, 0.07 * k, 0.02 * k, fill)


def _ship(c: Canvas, x: float, y: float, k: float, fill: RGB) -> None:
    h, w = 0.09 * k, 0.034 * k
    c.polygon([(x, y - h), (x + w, y - h / 2), (x + w, y + h), (x - w, y + h), (x - w, y - h / 2)], fill)
    c.rectangle(x, y + 0.05 * k, 0.036 * k, 0.03 * k, shade(fill, 0.6))


def _car(c: Canvas, x: float, y: float, k: float, fill: RGB) -> None:
    c.rectangle(x, y, 0.065 * k, 0.12 * k, fill)
    c.rectangle(x, y - 0.02 * k, 0.045 * k, 0.025 * k, (40, 44, 52))


def _tank(c: Canvas, x: float, y: float, k: float, fill: RGB) -> None:
    c.ellipse(x + 0.02 * k, y + 0.02 * k, 0.16 * k, 0.16 * k, (60, 58, 56))
    c.ellipse(x, y, 0.16 * k, 0.16 * k, fill)
    c.ellipse(x - 0.015 * k, y - 0.015 * k, 0.06 * k, 0.06 * k, shade(fill, 1.15))


def _court(c: Canvas, x: float, y: float, k: float, fill: RGB) -> None:
    c.rectangle(x, y, 0.14 * k, 0.19 * k, shade(fill, 0.75))
    c.rectangle(x, y, 0.1 * k, 0.15 * k, LINES)
    c.rectangle(x, y, 0.08 * k, 0.13 * k, fill)
    c.line(x - 0.05 * k, y, x + 0.05 * k, y, 0.014, LINES)


def _greenhouse(c: Canvas, x: float, y: float, k: float, fill: RGB) -> None:
    c.rectangle(x, y, 0.17 * k, 0.08 * k, fill)
    for i in (-1, 0, 1):
        c.line(x + 0.045 * i * k, y - 0.04 * k, x + 0.045 * i * k, y + 0.04 * k, 0.008, shade(fill, 0.75))


def _house(c: Canvas, x: float, y: float, k: float, fill: RGB) -> None:
    c.rectangle(x + 0.02 * k, y + 0.02 * k, 0.13 * k, 0.13 * k, (56, 54, 50))
    c.rectangle(x, y - 0.032 * k, 0.13 * k, 0.065 * k, fill)
    c.rectangle(x, y + 0.032 * k, 0.13 * k, 0.065 * k, shade(fill, 0.72))


def _truck(c: Canvas, x: float, y: float, k: float, fill: RGB) -> None:
    c.rectangle(x + 0.02 * k, y, 0.13 * k, 0.065 * k, fill)
    c.rectangle(x - 0.065 * k, y, 0.035 * k, 0.055 * k, (44, 48, 56))


def _train(c: Canvas, x: float, y: float, k: float, fill: RGB) -> None:
    c.rectangle(x, y, 0.24 * k, 0.06 * k, fill)
    for i in (-1, 1):
        c.rectangle(x + 0.045 * i * k, y, 0.012, 0.06 * k, shade(fill, 0.5))


def _parasol(c: Canvas, x: float, y: float, k: float, fill: RGB) -> None:
    c.ellipse(x + 0.02 * k, y + 0.02 * k, 0.1 * k, 0.1 * k, (136, 118, 88))
    c.ellipse(x, y, 0.1 * k, 0.1 * k, fill)
    c.ellipse(x, y, 0.035 * k, 0.035 * k, shade(fill, 0.6))


def _warehouse(c: Canvas, x: float, y: float, k: float, fill: RGB) -> None:
    c.rectangle(x + 0.02 * k, y + 0.02 * k, 0.2 * k, 0.15 * k, (58, 58, 60))
    c.rectangle(x, y, 0.2 * k, 0.15 * k, fill)
    for i in (-1, 0, 1):
        c.line(x - 0.1 * k, y + 0.04 * i * k, x + 0.1 * k, y + 0.04 * i * k, 0.01, shade(fill, 0.82))


def _pond(c: Canvas, x: float, y: float, k: float, fill: RGB) -> None:
    c.ellipse(x, y, 0.19 * k, 0.15 * k, (188, 172, 140))
    c.ellipse(x, y, 0.16 * k, 0.12 * k, shade(fill, 0.85))


_OBJECTS: dict[str, Callable[[Canvas, float, float, float, RGB], None]] = {
    "airport": _plane, "harbor": _ship, "parking": _car, "tanks": _tank, "tennis": _court,
    "farmland": _greenhouse, "residential": _house, "intersection": _truck, "railway": _train,
    "beach": _parasol, "industry": _warehouse, "park": _pond,
}  # fmt: skip

# The ground below the objects: apron, basin, lot, yard, ...
_YARDS: dict[str, RGB] = {
    "airport": (152, 154, 158), "harbor": (74, 122, 150), "parking": (120, 116, 112), "tanks": (186, 176, 158),
    "tennis": (150, 160, 136), "farmland": (168, 148, 110), "residential": (164, 160, 136),
    "intersection": (128, 122, 116), "railway": (96, 90, 88), "beach": (236, 220, 180),
    "industry": (140, 136, 134), "park": (128, 160, 96),
}  # fmt: skip

# (columns, rows) of the cells objects may stand in
_CELLS: dict[Region, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "left": ((0.22, 0.42), (0.24, 0.5, 0.76)),
    "right": ((0.58, 0.78), (0.24, 0.5, 0.76)),
    "top": ((0.24, 0.5, 0.76), (0.22, 0.42)),
    "bottom": ((0.24, 0.5, 0.76), (0.58, 0.78)),
    "center": ((0.3, 0.5, 0.7), (0.4, 0.6)),
}


def _yard(c: Canvas, facts: Facts) -> None:
    """The lighter or darker ground that shows where the objects are."""
    columns, rows = _CELLS[facts.region]
    width, height = columns[-1] - columns[0] + 0.2, rows[-1] - rows[0] + 0.22
    x, y = (columns[0] + columns[-1]) / 2, (rows[0] + rows[-1]) / 2
    c.rectangle(x, y, width, height, _YARDS[facts.kind])


def _band(c: Canvas, extra: Extra) -> None:
    """A road, a river or trees along one edge."""
    width = 0.09
    near = width / 2 if extra.edge in ("left", "top") else 1 - width / 2
    upright = extra.edge in ("left", "right")

    def at(t: float) -> tuple[float, float]:
        return (near, t) if upright else (t, near)

    if extra.name == "trees":
        for i in range(12):
            x, y = at(i / 11)
            c.ellipse(x, y, width, width, shade(LEAVES, c.rng.uniform(0.8, 1.3)))
        return
    c.line(*at(0.0), *at(1.0), width, WATER if extra.name == "river" else ASPHALT)
    if extra.name == "road":
        for i in range(0, 10, 2):
            c.line(*at(i / 10), *at(i / 10 + 0.1), 0.014, LINES)


def _through(image: Image.Image, look: Look, rng: random.Random) -> Image.Image:
    """The picture as the archive's sensor and season show it."""
    if look.blur:
        image = image.filter(ImageFilter.GaussianBlur(look.blur))
    image = ImageEnhance.Color(image).enhance(look.saturation)
    image = ImageEnhance.Contrast(image).enhance(look.contrast)
    table = [
        min(255, max(0, round(value * gain + bias)))
        for gain, bias in zip(look.gain, look.bias, strict=True)
        for value in range(256)
    ]
    image = image.point(table)
    grain = Image.frombytes("L", image.size, rng.randbytes(image.width * image.height))
    grain = grain.point([round(value * 2 * look.noise / 255) for value in range(256)])
    return ImageChops.add(image, Image.merge("RGB", (grain,) * 3), offset=-look.noise)


def place(facts: Facts, rng: random.Random) -> list[tuple[float, float]]:
    """Where the tile's objects stand: `facts.count` centres in the region, apart from each other."""
    columns, rows = _CELLS[facts.region]
    cells = rng.sample([(x, y) for x in columns for y in rows], facts.count)
    return [(x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02)) for x, y in cells]


def draw(facts: Facts, spots: list[tuple[float, float]], look: Look, rng: random.Random) -> Image.Image:
    """The tile with objects at the spots, 64 x 64: RGB, or L where the facts say it is panchromatic."""
    ground = shade(GROUNDS[facts.ground], rng.uniform(0.92, 1.08))
    c = Canvas(ground, rng)
    (_woods if facts.ground == "forest" else _speckle)(c, ground)
    _SCENERY[facts.kind](c, ground)
    _yard(c, facts)
    if facts.extra is not None:
        _band(c, facts.extra)
    fill = shade(COLOURS[facts.colour], rng.uniform(0.94, 1.06))
    for x, y in spots:
        _OBJECTS[facts.kind](c, x, y, look.scale * rng.uniform(0.92, 1.08), fill)
    image = _through(c.image.reduce(2), look, rng)
    return image.convert("L") if facts.panchromatic else image
