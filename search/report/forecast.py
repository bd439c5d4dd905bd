"""What the curves of all trials together say: which is lowest, which still fall, what more epochs would bring.

The model is the one that decides during a study (`search.planning.curves`), with its interval; nothing here is
extrapolated in any other way. A study with too little to fit has no forecasts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search import records
from search.planning.comparable import FAR
from search.planning.coordinates import Coordinates
from search.planning.prior import Prior
from search.planning.worth import Known, Outlook
from search.records import StudyRecord
from search.report.experiment import Experiment
from search.report.measured_noise import Noise
from search.space import from_dict
from trainer.config import TrainConfig

FEWEST = 3
"""Fewest trials with at least this many epochs each for the curves to be modelled."""
LATE = 0.75
"""Share of its epochs after which a trial's lowest loss must lie for it to count as still falling: the model's curves
fall by their prior, and so a little for ever."""
LONGER = 2.0
"""Factor by which more epochs are looked at and advised."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a trial is expected to reach, by the curves of all."""

    trial: int
    epoch: int
    now: float
    """Loss that the curves give it at its last epoch, freed of an epoch's noise."""
    loss: float
    low: float
    high: float
    """Ends of the 80 % interval."""

    @property
    def gain(self) -> float:
        """By how much the loss now lies above the one expected, a share."""
        return self.now / self.loss - 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the model says of a whole study."""

    lowest: tuple[int, int, float]
    """(trial, epoch, loss) of the lowest by the curves: what was trained, freed of noise."""
    longer: tuple[Forecast, ...]
    """For each trial that ran all its epochs: what `LONGER` times as many would bring."""
    stopped: tuple[Forecast, ...]
    """For each trial that was stopped by comparison: what its last planned epoch would have brought."""
    falling: tuple[int, ...]
    """Of those in `longer`, the trials that were lowest near their end and are expected to gain what counts as a
    difference, `Noise.difference`: of 1 % the log would say elsewhere that it is within noise."""


def outcome(
    record: StudyRecord, experiments: Sequence[Experiment], samples: tuple[Any, ...] | None, noise: Noise
) -> Outcome | None:
    """The model of a study's curves, fitted to the trials on the same samples; None with too few of them."""
    coordinates = Coordinates(from_dict(record.definition.get("space", {})))
    fitting = [e for e in experiments if e.samples == samples and e.resumed_by is None]
    known = {e.number: found for e in fitting if (found := _known(coordinates, e)) is not None}
    if sum(len(each.losses) >= FEWEST for each in known.values()) < FEWEST:
        return None
    outlook = Outlook(tuple(known[number] for number in sorted(known)), Prior())
    trial, epoch = outlook.named()
    done = [e for e in fitting if e.number in known and e.judged and len(e.rows) >= e.planned_epochs > 0]
    longer = _forecasts(outlook, [(known[e.number], math.ceil(LONGER * len(e.rows))) for e in done])
    cut = [
        e
        for e in fitting
        if e.number in known and e.record.reason in records.COMPARED and e.planned_epochs > len(e.rows)
    ]
    stopped = _forecasts(outlook, [(known[e.number], e.planned_epochs) for e in cut])
    late = {e.number for e in done if (e.record.best_epoch or 0) > LATE * len(e.rows)}
    falling = tuple(f.trial for f in longer if f.trial in late and f.gain > noise.difference)
    return Outcome(lowest=(trial, epoch, outlook.lowest_loss), longer=longer, stopped=stopped, falling=falling)


def _known(coordinates: Coordinates, e: Experiment) -> Known | None:
    """A trial as the model sees it; None if it has no losses, or a configuration that is not of the space."""
    if not e.rows or e.record.state == "FAIL":
        return None
    try:
        z, rest = coordinates.of({**_DEFAULTS, **e.record.config})
    except (ArithmeticError, KeyError, TypeError, ValueError):
        return None
    if not (math.isfinite(z) and np.all(np.abs(rest) <= FAR)):
        return None
    by_epoch = {row.epoch: row.val_loss for row in e.rows}
    losses = tuple(math.nan if (v := by_epoch.get(n)) is None else v for n in range(1, e.rows[-1].epoch + 1))
    return Known(e.number, z, tuple(rest), losses, max(e.planned_epochs, len(losses)))


_DEFAULTS = TrainConfig().model_dump(mode="json")


def _forecasts(outlook: Outlook, asked: Sequence[tuple[Known, int]]) -> tuple[Forecast, ...]:
    """What each trial is expected to reach at an epoch."""
    found = outlook.at([trial for trial, _ in asked], [(len(trial.losses), then) for trial, then in asked])
    means, deviations = (each.reshape(-1, 2).tolist() for each in found)
    return tuple(
        _forecast(outlook, trial, then, mean, 1.2816 * deviation[1])
        for (trial, then), mean, deviation in zip(asked, means, deviations, strict=True)
    )


def _forecast(outlook: Outlook, trial: Known, then: int, mean: Sequence[float], half: float) -> Forecast:
    level, loss, low, high = (outlook.curves.loss(v) for v in (mean[0], mean[1], mean[1] - half, mean[1] + half))
    return Forecast(trial=trial.number, epoch=then, now=level, loss=loss, low=low, high=high)
