"""A curve together with what is seen on it: excursions, rises, first and last losses."""

from __future__ import annotations

from dataclasses import dataclass

from search.diagnosis import advise
from search.diagnosis.curve import Curve
from search.diagnosis.finding import Scalar
from search.diagnosis.noise import Excursion, Rise, Series, best, excursions, rise, series

FEWEST_EPOCHS = 3
"""Two epochs give a direction but no trend: all recorded runs fall from the first to the second, however they end."""


@dataclass(frozen=True)
class Signals:
    """A curve and what is seen on it."""

    curve: Curve
    train: Series
    val: Series
    train_moves: tuple[Excursion, ...]
    val_moves: tuple[Excursion, ...]
    val_rise: Rise | None

    @property
    def train_open(self) -> Excursion | None:
        """The excursion in which the training loss ended."""
        return self.train_moves[-1] if self.train_moves and self.train_moves[-1].end is None else None


def read(curve: Curve) -> Signals:
    train = series((r.epoch, r.train_loss) for r in curve.epochs)
    val = series((r.epoch, r.val_loss) for r in curve.epochs)
    return Signals(
        curve=curve,
        train=train,
        val=val,
        train_moves=excursions(train, curve.train_noise),
        val_moves=excursions(val, curve.val_noise),
        val_rise=rise(val, curve.val_noise),
    )


def losses(seen: Signals) -> dict[str, Scalar]:
    """First, best and last loss of both curves, as far as they were recorded."""
    found: dict[str, Scalar] = {}
    for name, points in (("train", seen.train), ("val", seen.val)):
        if points:
            lowest = best(points)
            found |= {f"{name}_first": points[0][1], f"{name}_last": points[-1][1]}
            found |= {f"{name}_best": lowest[1], f"{name}_best_epoch": lowest[0]}
    return found | {"first_epoch": ends(seen)[0], "last_epoch": ends(seen)[1]}


def ends(seen: Signals) -> tuple[int, int]:
    epochs = [epoch for epoch, _ in (*seen.train, *seen.val)]
    return min(epochs, default=0), max(epochs, default=0)


def rate_evidence(seen: Signals) -> dict[str, Scalar]:
    rate = seen.curve.peak_rate
    return {} if rate is None else {"learning_rate": rate}


def high_rate(seen: Signals) -> bool:
    rate = seen.curve.peak_rate
    return rate is not None and rate >= advise.HIGH_RATE
