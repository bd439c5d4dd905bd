"""A trial's losses by epoch as an SVG, for its note on optuna-dashboard.

Why not Matplotlib: a worker draws it while other trials wait for the next pass. Matplotlib takes half a second to
import and 0.1 s for each plot, this template a millisecond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from search.leaderboard import show_metric
from search.markdown import environment
from search.records import EpochRecord, finite

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).with_name("templates")

WIDTH, HEIGHT = 600, 320
LEFT, RIGHT, TOP, BOTTOM = 72, 588, 32, 272
"""Edges of the plot itself."""
MARKED = 200
"""Most epochs drawn with a marker each."""
TICKS = 6
"""Approximate number of ticks on an axis."""


@dataclass(frozen=True)
class Line:
    """A curve, distinguished by dash and marker as well as by colour."""

    name: str
    colour: str
    dashed: bool
    points: tuple[tuple[float, float], ...] = ()


def draw(epochs: Sequence[EpochRecord], number: int) -> bytes:
    """Training and validation loss by epoch, the best epoch marked. At least one loss must be finite."""
    # Values that have a place, and the ranges of both axes.
    train = [(e.epoch, e.train_loss) for e in epochs if finite(e.train_loss)]
    val = [(e.epoch, e.val_loss) for e in epochs if finite(e.val_loss)]
    losses = [loss for _, loss in train + val]
    x_low, x_high = min(e.epoch for e in epochs), max(e.epoch for e in epochs)
    y_low, y_high = min(losses), max(losses)
    room = 0.06 * (y_high - y_low) or 0.05 * abs(y_high) or 1.0
    y_low, y_high = y_low - room, y_high + room

    def place(epoch: float, loss: float) -> tuple[float, float]:
        across = (epoch - x_low + 0.25) / (x_high - x_low + 0.5)
        up = (loss - y_low) / (y_high - y_low)
        return round(LEFT + across * (RIGHT - LEFT), 1), round(BOTTOM - up * (BOTTOM - TOP), 1)

    # Curves, and a legend that names the best loss.
    lines = [
        Line(name, colour, dashed, tuple(place(*each) for each in curve))
        for name, colour, dashed, curve in (
            ("training", "#0072b2", True, train),
            ("validation", "#d55e00", False, val),
        )
        if curve
    ]
    legend = [*lines]
    best = min(val, key=lambda each: (each[1], each[0])) if val else None
    if best is not None:
        legend.append(Line(f"best {show_metric(best[1])}", "", False))
    step = max(1.0, _step(x_low, x_high))
    text = _template().render(
        title=f"trial {number}",
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        top=TOP,
        bottom=BOTTOM,
        x_ticks=[(place(x, y_low)[0], f"{x:.0f}") for x in _ticks(x_low, x_high, step)],
        y_ticks=[(place(x_low, y)[1], f"{y:.6g}") for y in _ticks(y_low, y_high, _step(y_low, y_high))],
        markers=len(epochs) <= MARKED,
        lines=lines,
        legend=legend,
        best=place(*best) if best is not None else None,
    )
    return text.encode()


def _step(low: float, high: float) -> float:
    """A round distance between ticks: 1, 2 or 5 times a power of ten."""
    rough = (high - low) / TICKS or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * 0.999)


def _ticks(low: float, high: float, step: float) -> list[float]:
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


@cache
def _template() -> Template:
    return environment(TEMPLATES).get_template("losses.svg.jinja")
