"""Which values of a parameter did as well as the best: the trials that show it, and the others between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from search import records
from search.diagnosis.noise import relative
from search.report.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class Level:
    """From the lowest to the highest value whose trial came as low as the best, within noise."""

    low: Any
    high: Any
    trials: tuple[int, ...]
    behind: tuple[int, ...]
    """Trials at values between them that came to more than noise above the best."""
    stopped: tuple[int, ...]
    """Those that were stopped by comparison, so that nobody knows what they would have come to."""


def level(
    members: Sequence[tuple[Any, Experiment]],
    compared: Sequence[Experiment],
    best: Experiment | None,
    difference: float,
) -> Level | None:
    """The level ones of a range; None where there are none.

    Args:
        members: (value, trial) of all finished trials in it.
        compared: Those whose losses compare.
        best: The lowest of the whole table.
        difference: What counts as one, see `Noise.difference`.
    """
    if best is None or best.value is None:
        return None
    losses = {e.number: e.value for e in compared if e.value is not None}
    near = {n for n, loss in losses.items() if relative(loss, best.value) <= difference}
    values = [value for value, e in members if e.number in near]
    if not values:
        return None
    low, high = min(values), max(values)
    inside = [e for value, e in members if low <= value <= high]
    return Level(
        low=low,
        high=high,
        trials=tuple(e.number for _, e in members if e.number in near),
        behind=tuple(e.number for e in inside if e.number in losses and e.number not in near),
        stopped=tuple(e.number for e in inside if is_stopped(e)),
    )


def is_stopped(e: Experiment) -> bool:
    """Whether a trial was ended by a comparison with others: its lowest loss is not what it would have come to."""
    return not e.judged and e.record.reason in records.COMPARED
