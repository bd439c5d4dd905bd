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

AHEAD = (1, 2, 4, 8, 16, 32, 64)
"""Epochs ahead at which a trial is looked at, its last epoch besides."""
KEPT_EPOCHS = 7
"""Most epochs of one trial that the model is given: the latest, and those before thinned in equal steps of log epoch.
The cost of a fit grows with their cube."""
MOST_POINTS, IN_FULL = 800, 60
"""With more points than this, only the trials of the lowest losses are given in full, of all others the latest epoch:
a decision on 1,000 trials takes 1 s and not 20."""
AT_ONCE = 64
"""Trials of a forecast at once: for each alone, the model's whole matrix would be read from memory again."""
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
        self.empty = not any(trial.losses for trial in trials)
        if self.empty:
            return
        points = _points(trials, _observed(trials))
        at = zip(points.owner, points.epoch.astype(np.int64), strict=True)
        losses = np.array([trials[i].losses[epoch - 1] for i, epoch in at])
        self.curves = Curves(points, losses, centre=prior.centre, width=prior.width)
        mean, _ = self.curves.predict(points)
        self.lowest = float(mean.min())
        """Of what has been trained, bent: the model's, since the lowest of many noisy epochs is luck."""

    def named(self) -> tuple[int, int]:
        """(number of the trial, epoch) whose loss is lowest by the curves: of what was trained, freed of noise."""
        begun = [trial for trial in self.trials if trial.losses]
        at = _points(begun, [range(1, len(trial.losses) + 1) for trial in begun])
        best = int(np.argmin(self.curves.predict(at)[0]))
        return begun[at.owner[best]].number, int(at.epoch[best])

    def at(self, trials: Sequence[Known], epochs: Sequence[Sequence[int]]) -> tuple[Array, Array]:
        """(means, standard deviations) of the bent losses of trials at some epochs of each; see `Curves.predict`."""
        parts = [
            self.curves.predict(_points(trials[i : i + AT_ONCE], epochs[i : i + AT_ONCE]))
            for i in range(0, len(trials), AT_ONCE)
        ]
        mean, sd = (np.concatenate([part[i] for part in parts] or [np.zeros(0)]) for i in range(2))
        return mean, sd

    def of(self, trials: Sequence[Known]) -> list[Worth]:
        """The worth of going on with these; those that have not begun have no losses and the number -1."""
        if not trials:
            return []
        now = [len(trial.losses) for trial in trials]
        last = [max(trial.num_epochs, n + 1) for trial, n in zip(trials, now, strict=True)]
        ahead = [
            sorted({*(n + step for step in AHEAD if n + step < end), end}) for n, end in zip(now, last, strict=True)
        ]
        at = _points(trials, ahead)
        mean, sd = self.curves.predict(at)
        gain = expected_improvement(self.lowest - mean, sd)
        # What a trial may already have is no gain of going on: how low it is now is not known exactly either.
        begun = [i for i, n in enumerate(now) if n]
        has = np.zeros(len(trials))
        if begun:
            mean_now, sd_now = self.curves.predict(_points([trials[i] for i in begun], [[now[i]] for i in begun]))
            has[begun] = expected_improvement(self.lowest - mean_now, sd_now)
        gain = np.maximum(gain - has[at.owner], 0.0)
        rate = gain / (at.epoch - np.array(now)[at.owner])
        ends = np.cumsum([len(epochs) for epochs in ahead]) - 1
        best = np.maximum.reduceat(rate, np.append(0, ends[:-1] + 1))
        return [Worth(float(best[i]), float(gain[j]), *self._interval(mean[j], sd[j])) for i, j in enumerate(ends)]

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


def _points(trials: Sequence[Known], epochs: Sequence[Sequence[int]]) -> Points:
    """Points at some epochs of each trial."""
    return Points(
        np.array([trial.z for trial in trials]),
        np.array([trial.rest for trial in trials], dtype=np.float64).reshape(len(trials), -1),
        np.array([trial.number for trial in trials]),
        np.repeat(np.arange(len(trials)), [len(each) for each in epochs]),
        np.array([epoch for each in epochs for epoch in each], dtype=np.float64),
    )


def _observed(trials: Sequence[Known]) -> list[list[int]]:
    """The epochs of each trial that the model is given."""
    epochs = [_thinned(len(trial.losses)) for trial in trials]
    if sum(map(len, epochs)) <= MOST_POINTS:
        return epochs
    lowest = [min(filter(math.isfinite, trial.losses), default=math.inf) for trial in trials]
    full = {*sorted(range(len(trials)), key=lambda i: (lowest[i], trials[i].number))[:IN_FULL]}
    return [kept if i in full else kept[-1:] for i, kept in enumerate(epochs)]


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
