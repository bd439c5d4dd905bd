"""Colours of trials."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from search import colours


def oklab(colour: str) -> tuple[float, float, float]:
    """Ottosson's perceptual coordinates of an sRGB colour (2020)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    x, y, z = (
        (p * r + q * g + s * b) ** (1 / 3)
        for p, q, s in (
            (0.4122214708, 0.5363325363, 0.0514459929),
            (0.2119034982, 0.6806995451, 0.1073969566),
            (0.0883024619, 0.2817188376, 0.6299787005),
        )
    )
    return (
        0.2104542553 * x + 0.7936177850 * y - 0.0040720468 * z,
        1.9779984951 * x - 2.4285922050 * y + 0.4505937099 * z,
        0.0259040371 * x + 0.7827717662 * y - 0.8086757660 * z,
    )


@pytest.mark.parametrize(("trials", "apart"), [(12, 0.15), (40, 0.075)])
def test_trials_are_told_apart(trials: int, apart: float) -> None:
    places = [oklab(colours.of_trial(number)) for number in range(trials)]
    distances = [sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5 for a, b in combinations(places, 2)]
    assert min(distances) > apart


def test_they_are_colours_and_go_on() -> None:
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours.PALETTE)
    assert colours.of_trial(0) == colours.of_trial(len(colours.PALETTE))
