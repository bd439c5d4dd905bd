"""The same picture under several names: identical, resized, recompressed, mirrored or turned copies.

Each image is reduced to 16 x 16 pixels. The mean of these over the eight symmetries of the square does not change when
a picture is mirrored or turned, so one matrix product finds candidates; those are compared in all eight positions.

Measured: among the 132 tiles of the real input and the 640 of the embedded data no two different tiles are taken for
copies (correlation at most 0.75 and 0.99, the latter at a distance above 2). Of the real tiles, copies at JPEG quality
20, at a third of the size, at one and a half times the size without interpolation, turned or mirrored are all found
(correlation at least 0.971, distance at most 1.5). Of tiles of 64 pixels some recompressed ones are missed. Crops,
shifts and changes of colour are not looked for. A sketch takes 0.1 ms for 224 x 224 pixels, the search 0.3 s
for 10,000 images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SIZE = 16
"""Width and height of a sketch."""
DISTANCE = 2.0
"""Most root mean square difference, in levels of 255, of candidates' means over the eight positions."""
CORRELATION = 0.97
"""Least correlation of the grey sketches of copies."""
PLAIN = 1.0
"""Least standard deviation in levels: a picture of one colour says nothing, and is a copy of none."""
SAME = 2
"""Most difference of levels, in each channel, within a picture of one colour."""
ASPECT = 0.06
"""Most difference of the logarithms of width over height: a resized copy is rounded to whole pixels."""
BLOCK = 256
"""Rows of the distance matrix that are computed at once."""
PAIRS = 1024
"""Candidates that are compared at once."""


@dataclass(frozen=True)
class Picture:
    """What is kept of a decoded image to find its copies by."""

    digest: str
    """Of the file (`images.identity`)."""
    width: int
    height: int
    sketch: bytes
    """SIZE x SIZE pixels, RGB."""
    plain: bool = False
    """The whole picture is of one colour."""


@dataclass(frozen=True)
class Group:
    """Pictures that are copies of one another."""

    members: tuple[int, ...]
    """Their numbers in the sequence given, ascending, at least two."""
    identical: bool
    """All of them are the same file, byte by byte."""


def picture(image: Image.Image, digest: str, size: tuple[int, int] | None = None) -> Picture:
    """What is kept of an image.

    Args:
        image: RGB.
        digest: of the file.
        size: its width and height, if `image` is a smaller one.
    """
    if image.width % SIZE or image.height % SIZE:
        small = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    else:  # the same to a level, in half the time
        small = image.reduce((image.width // SIZE, image.height // SIZE))
    # A ship on a dark sea vanishes in the sketch: where that is plain, the picture itself is asked.
    plain = _one_colour(small) and _one_colour(image)
    return Picture(digest, *(size or image.size), small.tobytes(), plain)


def _one_colour(image: Image.Image) -> bool:
    ranges: Any = image.getextrema()
    return all(high - low <= SAME for low, high in ranges)


def find(pictures: Sequence[Picture]) -> list[Group]:
    """Groups of copies, by their first member."""
    if not pictures:
        return []
    roots = list(range(len(pictures)))
    sketches = np.stack([np.frombuffer(p.sketch, np.uint8).reshape(SIZE, SIZE, 3) for p in pictures])
    grey = sketches.astype(np.float32).mean(3).reshape(len(pictures), -1)
    grey -= grey.mean(1, keepdims=True)
    spread = np.sqrt((grey**2).mean(1))
    varied = np.flatnonzero(spread >= PLAIN)
    first: dict[str, int] = {}
    for number in varied.tolist():
        _join(roots, first.setdefault(pictures[number].digest, number), number)
    # One of each file goes on to the search for near copies.
    ones = np.array([n for n in varied.tolist() if first[pictures[n].digest] == n], dtype=np.int64)
    if len(ones):
        units = grey[ones] / (spread[ones, None] * SIZE)
        aspects = np.log([pictures[n].width / pictures[n].height for n in ones.tolist()])
        for left, right in _candidates(sketches[ones]):
            same = _same(units, aspects, left, right)
            for a, b in zip(ones[left[same]].tolist(), ones[right[same]].tolist(), strict=True):
                _join(roots, a, b)
    groups: dict[int, list[int]] = {}
    for number in range(len(pictures)):
        groups.setdefault(_root(roots, number), []).append(number)
    return [
        Group(tuple(members), len({pictures[n].digest for n in members}) == 1)
        for members in groups.values()
        if len(members) > 1
    ]


def merged(scenes: Sequence[str], groups: Sequence[Group]) -> list[str]:
    """For each row its scene, with scenes that share a picture under the name of the first: a split by these keeps
    copies on one side. Without copies it returns the scenes as they are."""
    numbers = {scene: number for number, scene in enumerate(dict.fromkeys(scenes))}
    names, roots = list(numbers), list(range(len(numbers)))
    for group in groups:
        for member in group.members[1:]:
            _join(roots, numbers[scenes[group.members[0]]], numbers[scenes[member]])
    return [names[_root(roots, numbers[scene])] for scene in scenes]


def _positions(pixels: np.ndarray) -> Iterator[tuple[bool, np.ndarray]]:
    """(whether width and height change places, the pixels (N, SIZE, SIZE, ...)) in each of the eight positions."""
    for swapped, turned in ((False, pixels), (True, pixels.swapaxes(1, 2))):
        for rows in (turned, turned[:, ::-1]):
            yield swapped, rows
            yield swapped, rows[:, :, ::-1]


def _candidates(sketches: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of numbers whose means over the eight positions are near each other, at most BLOCK at once."""
    whole = sketches.astype(np.float32)
    mean = np.add.reduce([position for _, position in _positions(whole)]) / 8
    half = SIZE // 2  # the other quarters are the same
    features = mean[:, :half, :half].reshape(len(sketches), -1)
    # Pictures that differ by so much in brightness differ by no less in their pixels: only neighbours are compared.
    order = np.argsort(features.mean(1), kind="stable")
    bright = features.mean(1)[order]
    features = (features - features.mean(0))[order]
    squares = (features**2).sum(1)
    limit = DISTANCE**2 * features.shape[1]
    for start in range(0, len(features), BLOCK):
        stop = min(start + BLOCK, len(features))
        end = int(np.searchsorted(bright, bright[stop - 1] + DISTANCE, side="right"))
        apart = squares[start:stop, None] + squares[None, start:end] - 2 * features[start:stop] @ features[start:end].T
        left, right = np.nonzero(apart < limit)
        later = right > left
        left, right = order[left[later] + start], order[right[later] + start]
        for at in range(0, len(left), PAIRS):
            yield left[at : at + PAIRS], right[at : at + PAIRS]


def _same(units: np.ndarray, aspects: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(pairs,) bool: whether one is the other in one of the eight positions."""
    found = np.zeros(len(left), dtype=bool)
    fixed = units[left]
    for swapped, position in _positions(units[right].reshape(-1, SIZE, SIZE)):
        other = -aspects[right] if swapped else aspects[right]
        alike = (fixed * position.reshape(len(right), -1)).sum(1) >= CORRELATION
        found |= alike & (np.abs(aspects[left] - other) < ASPECT)
    return found


def _root(roots: list[int], number: int) -> int:
    while roots[number] != number:
        roots[number] = roots[roots[number]]
        number = roots[number]
    return number


def _join(roots: list[int], a: int, b: int) -> None:
    a, b = sorted((_root(roots, a), _root(roots, b)))
    roots[b] = a
