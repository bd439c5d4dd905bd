"""A seeded generator of overhead scenes with captions, in RSICap's format. Needs Pillow alone.

A scene is a place: its tiles share kind, ground, colour of the objects and sensor, and differ in which objects stand
where. A style is an archive of scenes: how its pictures look and how its captions are worded. The embedded model is
pretrained on ARCHIVES; the studies use STUDY, whose look and wording differ from all of theirs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from trainer.mini.captions import INSTRUCTIONS, SLOTS, Voice, caption
from trainer.mini.drawing import Look, draw, place
from trainer.mini.vocabulary import EDGES, EXTRAS, KINDS, MAX_COUNT, REGIONS, Extra, Facts

GENERATOR_VERSION = 1
"""Raised with every change that alters the tiles or captions of a seed: cached data is then generated again."""


@dataclass(frozen=True)
class Style:
    """An archive: how its pictures look, how its captions are worded."""

    look: Look
    voice: Voice
    panchromatic: float
    """Share of its scenes that are panchromatic."""


@dataclass(frozen=True)
class Scene:
    """One place, photographed in several tiles."""

    facts: Facts
    """Of the scene's first tile; later ones change `count`, `region` and `extra`."""
    look: Look


@dataclass(frozen=True)
class Tile:
    """A picture with the facts that it shows and a caption that states them."""

    image: Image.Image
    facts: Facts
    spots: list[tuple[float, float]]
    """Centres of the objects, as fractions of the tile."""
    instruction: str
    caption: str


def _voice(*preferred: int, loyalty: float = 0.8) -> Voice:
    assert len(preferred) == len(SLOTS)
    return Voice(preferred, loyalty)


# Eight archives, each recognisable by its look, whose wordings cross: the wording of one slot says little about that
# of the next, so the language model learns to read each slot from the query outputs.
ARCHIVES = (
    Style(Look(), _voice(0, 0, 0, 0, 0, 0, 0, 0, 0), 0.15),
    Style(Look(gain=(1.1, 1.0, 0.75), noise=5), _voice(1, 1, 1, 1, 1, 1, 1, 1, 1), 0.15),
    Style(Look(gain=(0.8, 0.95, 1.15), contrast=1.2), _voice(2, 2, 0, 2, 1, 2, 2, 2, 2), 0.15),
    Style(Look(gain=(0.55, 0.55, 0.55), noise=12), _voice(0, 1, 1, 2, 0, 2, 1, 0, 2), 0.15),
    Style(Look(gain=(0.6, 0.6, 0.6), bias=(90, 90, 96), noise=4), _voice(1, 2, 0, 0, 1, 1, 0, 2, 1), 0.15),
    Style(Look(saturation=1.7, blur=0.6), _voice(2, 0, 1, 1, 0, 0, 2, 1, 0), 0.15),
    Style(Look(gain=(0.85, 1.15, 0.85), noise=20), _voice(0, 2, 0, 1, 1, 0, 1, 2, 0), 0.15),
    Style(Look(saturation=0.4, contrast=0.8, scale=0.85), _voice(1, 0, 1, 0, 0, 2, 2, 0, 1), 0.15),
)

# A dry, hazy late summer seen from closer by, worded in a mixture of the archives' ways.
STUDY = Style(
    Look(gain=(0.98, 0.8, 0.58), bias=(34, 22, 10), saturation=0.8, contrast=1.1, noise=10, scale=1.15),
    _voice(2, 1, 1, 0, 0, 2, 1, 1, 2, loyalty=0.75),
    0.2,
)


def sample_scene(style: Style, rng: random.Random, kind: str | None = None) -> Scene:
    """A place of the given kind, or of any."""
    kind = kind or rng.choice(list(KINDS))
    facts = Facts(
        kind=kind,
        ground=rng.choice(KINDS[kind].grounds),
        colour=rng.choice(KINDS[kind].colours),
        count=1,
        region="center",
        extra=None,
        panchromatic=rng.random() < style.panchromatic,
    )
    exposure = rng.uniform(0.94, 1.06)
    red, green, blue = style.look.gain
    return Scene(facts, replace(style.look, gain=(red * exposure, green * exposure, blue * exposure)))


def sample_tile(scene: Scene, style: Style, rng: random.Random) -> Tile:
    """One tile of the place."""
    extra = Extra(rng.choice(EXTRAS), rng.choice(EDGES)) if rng.random() < 0.65 else None
    facts = replace(scene.facts, count=rng.randint(1, MAX_COUNT), region=rng.choice(REGIONS), extra=extra)
    spots = place(facts, rng)
    image = draw(facts, spots, scene.look, rng)
    return Tile(image, facts, spots, rng.choice(INSTRUCTIONS), caption(facts, style.voice, rng))


def _scenes(style: Style, count: int, rng: random.Random) -> Iterator[tuple[int, Scene]]:
    """Numbered scenes, all kinds in turn, with gaps in the numbering as in the real set."""
    kinds = list(KINDS)
    rng.shuffle(kinds)
    number = 0
    for i in range(count):
        number += rng.randint(1, 9)
        yield number, sample_scene(style, rng, kinds[i % len(kinds)])


def write_dataset(out: Path, *, scenes: int, tiles_per_scene: int, seed: int, style: Style) -> None:
    """Write `captions.json` and `images/` as RSICap has them, its quirks included.

    Some captions have double or trailing spaces, some images are panchromatic (mode L), one image has no caption,
    and `images/` holds a `.DS_Store`. `P0378_0001.png` is tile 1 of scene 378.
    """
    rng = random.Random(seed)
    images = out / "images"
    images.mkdir(parents=True)
    rows: list[dict[str, str]] = []
    tile = None
    for number, scene in _scenes(style, scenes, rng):
        for index in range(1, tiles_per_scene + 1):
            tile = sample_tile(scene, style, rng)
            filename = f"P{number:04d}_{index:04d}.png"
            tile.image.save(images / filename)
            rows.append(
                {
                    "image_id": str(len(rows)),
                    "filename": filename,
                    "text_input": tile.instruction,
                    "text_output": _untidy(tile.caption, rng),
                }
            )
    if tile is not None:
        tile.image.save(images / "P9999_0001.png")
    (images / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    (out / "captions.json").write_text(json.dumps({"annotations": rows}, indent=1), encoding="utf-8")


def _untidy(text: str, rng: random.Random) -> str:
    """One caption in ten gets a double space, another a trailing one."""
    dice = rng.random()
    if dice < 0.1:
        return text.replace(". ", ".  ", 1)
    return text + " " if dice < 0.2 else text
