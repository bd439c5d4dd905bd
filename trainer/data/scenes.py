"""Scenes and classes, from the names of images: what must stay on one side of a split, and what must not.

A **scene** is a place: tiles cut from one picture look alike and may overlap, so they are all held out or none is. A
**class** is a kind of place (airport, beach): a class that is held out whole was never learnt, so its images are split
one by one. Published names say which:

- `P0378_0001.png`: a part with a digit in it before the running number is a scene, P0378. So it is in RSICap, RSIEval
  and VRSBench, and in other layouts too. There a part that more than half of the images have may be the name of the
  whole set, as in `COCO_val2014_000000391895.jpg`: with fewer than `SURELY_SCENES` parts in all, there are no scenes
  then, and the split warns (`alike`).
- `airport_12.jpg`: a word before the running number is a class. Only where there are many words with few images each
  (`FEWEST_PLACES`, `MOST_OF_PLACE`), as in `lisbon_1.png`, is it the name of a place, and so a scene.
- A folder, as in `airport/12.jpg`, is a class.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath, PurePosixPath

from trainer.data.layouts.entry import Tiles

SURELY_SCENES = 4
"""Numbered parts of names that are scenes however unevenly the images are spread over them. COCO's sets are three."""
FEWEST_PLACES = 20
"""Fewest words that are taken for places."""
MOST_OF_PLACE = 4
"""Most images of a place on average, where places are words. Classes of published sets have 7 to 700 images."""


def scene_parts(names: Sequence[PurePosixPath], tiles: Tiles) -> list[str | None]:
    """For each image the part of its name that names its scene, None where it stands for itself."""
    if tiles == "never":
        return [None] * len(names)
    parts = [_before_number(name) for name in names]
    words = Counter(part for part in parts if part is not None and not _has_digit(part))
    use_numbered = tiles == "always" or not alike(names, tiles)
    use_words = len(words) >= FEWEST_PLACES and words.total() <= MOST_OF_PLACE * len(words)
    return [part if part is not None and (use_numbered if _has_digit(part) else use_words) else None for part in parts]


def alike(names: Sequence[PurePosixPath], tiles: Tiles) -> str | None:
    """The numbered part that most names begin with, where it may be the name of the whole set and so is no scene."""
    parts = Counter(part for part in map(_before_number, names) if part is not None and _has_digit(part))
    if tiles != "likely" or not parts or len(parts) >= SURELY_SCENES:
        return None
    part, count = parts.most_common(1)[0]
    return part if count > len(names) / 2 else None


def with_single(names: Sequence[PurePosixPath], images: Sequence[PurePath], known: Sequence[str | None]) -> list[str]:
    """The known scenes, and for each image that is of none a scene of its own: its name without its suffix.

    Where images share that (`train/0000.jpg` and `val/0000.jpg`, `im0.jpg` and `im0.png`) it is the whole path: they
    are of one name, not of one place. The name alone is as earlier versions had it, and in the data's fingerprint.
    """
    stems = [str(name.with_suffix("")) for name in names]
    sharing: dict[str, set[PurePath]] = {}
    for stem, image, scene in zip(stems, images, known, strict=True):
        if scene is None:
            sharing.setdefault(stem, set()).add(image)
    alone = [
        image.as_posix() if len(sharing.get(stem, ())) > 1 else stem for stem, image in zip(stems, images, strict=True)
    ]
    return [own if scene is None else scene for own, scene in zip(alone, known, strict=True)]


def class_parts(names: Sequence[PurePosixPath], scenes: Sequence[str | None]) -> list[str | None]:
    """For each image the class that its folder or its name says, None where it says none.

    There are classes only if there are at least two, with two images each on average.
    """
    parts = [None if scene is not None else _word(name) for name, scene in zip(names, scenes, strict=True)]
    found = Counter(part for part in parts if part is not None)
    if len(found) < 2 or found.total() < 2 * len(found):
        return [None] * len(names)
    return parts


def _before_number(name: PurePosixPath) -> str | None:
    """`deep/P0378` of `deep/P0378_0001.png`; None where the name does not end with `_` and a number."""
    prefix, separator, tile = str(name.with_suffix("")).rpartition("_")
    return prefix if separator and tile.isdigit() else None


def _has_digit(part: str) -> bool:
    return any(c.isdigit() for c in part.rpartition("/")[2])


def _word(name: PurePosixPath) -> str | None:
    """`airport` of `airport/12.jpg`, `airport_12.jpg` and `airport12.jpg`."""
    if len(name.parts) > 1:
        return name.parts[-2]
    match = re.fullmatch(r"([^\W\d][^\d]*?)[ _(-]*\d+\)?", name.stem)
    return match.group(1) if match else None
