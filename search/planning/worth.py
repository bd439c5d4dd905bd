"""What an epoch of a trial is worth: the expected fall of the study's lowest loss, for each epoch that it takes.

For a trial at epoch t and each later epoch h, the curves say what its loss will be there, a normal distribution; the
expected improvement over the lowest loss so far (Mockus 1974; Jones et al. 1998), divided by the epochs h - t, is its
rate of gain by h; the largest over all h is the trial's worth. A configuration that has not begun is a trial at epoch
0. So a promising trial goes on while it falls, others begin once it gains less than they may, and one that leads at an
early epoch is not preferred for that alone: what counts is where its curve is expected to lead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.planning.curves import Array, Curves, Points
from search.planning.prior import Prior

AHEAD = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Epochs ahead at which a trial is looked at, its last epoch besides."""
KEPT_EPOCHS = 8
"""Most epochs of one trial that the model is given: the latest, and those before thinned in equal steps of log epoch.
The cost of a fit grows with their cube."""
SQRT_2 = math.sqrt(2.0)
SQRT_2_PI = math.sqrt(2.0 * math.pi)

_erf = np.vectorize(math.erf, otypes=[float])


@dataclass(frozen=True)
class Known:
    """A trial, as the plan sees it."""

    number: int
    z: float
    """log10 of its effective rate."""
    rest: tuple[float, ...]
    """Its other coordinates."""
    losses: tuple[float, ...]
    """Validation loss by epoch; NaN or infinite where there was none."""
    num_epochs: int
    """Epochs of the whole trial."""
    running: bool = False
    paused: bool = False


@dataclass(frozen=True)
class Worth:
    """What the next epochs of a trial or configuration are worth."""

    per_epoch: float
    """Largest expected fall of the lowest loss per epoch, in log loss."""
    total: float
    """Expected fall of the lowest loss, if it is trained to its last epoch."""
    final: float
    """Expected loss at its last epoch."""
    low: float
    high: float
    """Ends of the 80 % interval of that loss."""


class Outlook:
    """The curves of a study's trials, and the worth of what could be trained next.

    Args:
        trials: All trials that have begun, without repeats.
        prior: Of the effective rate.
    """

    def __init__(self, trials: Sequence[Known], prior: Prior) -> None:
        self.trials = trials
        width = len(trials[0].rest) if trials else 0
        rows: list[tuple[float, tuple[float, ...], float, int, float]] = []
        for trial in trials:
            epochs = _thinned(len(trial.losses))
            rows += [(trial.z, trial.rest, float(epoch), trial.number, trial.losses[epoch - 1]) for epoch in epochs]
        self.empty = not rows
        if self.empty:
            return
        points = Points(
            np.array([row[0] for row in rows]),
            np.array([row[1] for row in rows]).reshape(len(rows), width),
            np.array([row[2] for row in rows]),
            np.array([row[3] for row in rows]),
        )
        self.curves = Curves(points, np.array([row[4] for row in rows]), centre=prior.centre, width=prior.width)
        mean, _ = self.curves.predict(points)
        self.lowest = float(mean.min())
        """Of what has been trained, bent: the model's, since the lowest of many noisy epochs is luck."""

    def of(self, trials: Sequence[Known]) -> list[Worth]:
        """The worth of going on with these; those that have not begun have no losses and the number -1."""
        if not trials:
            return []
        z, rest, epochs, numbers, owner, ahead = [], [], [], [], [], []
        for i, trial in enumerate(trials):
            now = len(trial.losses)
            last = trial.num_epochs
            for epoch in sorted({now + step for step in AHEAD if now + step < last} | {max(last, now + 1)}):
                z.append(trial.z)
                rest.append(trial.rest)
                epochs.append(float(epoch))
                numbers.append(trial.number)
                owner.append(i)
                ahead.append(epoch - now)
        at = Points(
            np.array(z), np.array(rest).reshape(len(z), len(trials[0].rest)), np.array(epochs), np.array(numbers)
        )
        mean, sd = self.curves.predict(at)
        gain = expected_improvement(self.lowest - mean, sd)
        rate = gain / np.array(ahead)
        owners = np.array(owner)
        last_of = np.flatnonzero(np.append(owners[1:] != owners[:-1], True))
        best = np.maximum.reduceat(rate, np.append(0, last_of[:-1] + 1))
        return [Worth(float(best[i]), float(gain[j]), *self._interval(mean[j], sd[j])) for i, j in enumerate(last_of)]

    @property
    def lowest_loss(self) -> float:
        """The lowest validation loss so far, freed of the noise of its evaluation."""
        return self.curves.loss(self.lowest)

    def _interval(self, mean: float, sd: float) -> tuple[float, float, float]:
        """(expected loss, low and high end of its 80 % interval)."""
        half = 1.2816 * float(sd)
        return (
            self.curves.loss(float(mean)),
            self.curves.loss(float(mean) - half),
            self.curves.loss(float(mean) + half),
        )


def expected_improvement(gap: Array, sd: Array) -> Array:
    """E[max(gap + sd x, 0)] for a standard normal x."""
    u = gap / sd
    density = np.exp(-0.5 * u * u) / SQRT_2_PI
    below = 0.5 * (1.0 + _erf(u / SQRT_2))
    found: Array = np.maximum(gap * below + sd * density, 0.0)
    return found


def _thinned(count: int) -> list[int]:
    """Epochs 1 to `count`, or `KEPT_EPOCHS` of them: the first, the latest, and some evenly spread in log epoch."""
    if count <= KEPT_EPOCHS:
        return list(range(1, count + 1))
    steps = np.exp(np.linspace(0, math.log(count - 1), KEPT_EPOCHS - 1))
    return sorted({*(round(float(step)) for step in steps), count})
