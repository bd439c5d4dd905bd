"""How much a loss moves by chance, and the questions about a curve that depend on it.

All thresholds follow from two numbers measured on the recorded real runs of InstructBLIP-FlanT5-XL on RSICap (nine
runs of four epochs and more, `python -m search.diagnose` reads their file; docs/diagnosis.md has the table). Noise is
what remains of a curve after its trend: the root mean square of second differences over sqrt(6), without the first
epochs, where the curve itself bends, as a share of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import fmean, median

VAL_NOISE = 0.004
"""Standard deviation of one epoch's validation loss. Measured 0.37 % over all runs (61 differences), 0.2 % to 0.7 % by
run."""
TRAIN_NOISE = 0.002
"""Standard deviation of one epoch's training loss, a mean over the whole epoch. Measured 0.07 % to 0.22 % on the runs
of eight epochs and more; shorter runs are still bending, which second differences take for noise."""
TRAIN_NOISE_SAMPLES = 2068
"""Samples of the runs that TRAIN_NOISE was measured on, training and validation together."""
SIGNIFICANT = 3.0
"""Standard deviations that count as significant. A search reads thousands of epochs: at 2 one in 44 would raise an
alarm by chance, at 3 one in 740 does (one-sided, normal)."""

Loss = tuple[int, float]
"""(epoch, loss)"""
Series = tuple[Loss, ...]

_LARGEST = 1e30
_SMALLEST = 1e-6


def train_noise(samples: float | None) -> float:
    """Standard deviation of an epoch's training loss on this many samples, as a share of the loss.

    The training loss is a mean over samples that each saw a different dropout mask and different weights, so with
    fewer of them it is noisier, by the square root; the validation loss is over the same samples without dropout each
    time, and moves with the weights alone. Measured on the embedded model (240 training samples, a settled run):
    0.6 %, where this gives 0.5 %.
    """
    if samples is None or samples < 1:
        return TRAIN_NOISE
    return TRAIN_NOISE * math.sqrt(max(1.0, TRAIN_NOISE_SAMPLES / samples))


def usable(value: float | None) -> bool:
    """Whether the value can be calculated with: neither missing nor NaN, infinite or about to overflow."""
    return value is not None and -_LARGEST < value < _LARGEST  # NaN is not; a whole number may be beyond floats


def series(points: Iterable[tuple[int, float | None]]) -> Series:
    """The usable losses by epoch, in order; if an epoch comes twice, the last one counts."""
    return tuple(sorted({epoch: value for epoch, value in points if value is not None and usable(value)}.items()))


def relative(value: float, reference: float) -> float:
    """How far the value lies above the reference, as a share of the reference."""
    return (value - reference) / max(abs(reference), _SMALLEST)


def limit(noise: float, n: int = 1) -> float:
    """The smallest significant rise of a mean of n epochs over a single epoch.

    The difference of a mean of n and a single value has the deviation noise * sqrt(1 + 1/n). For validation loss:
    1.7 % for one epoch, 1.4 % for three. The largest rise that a recorded run came back from was 0.5 %.
    """
    return SIGNIFICANT * noise * math.sqrt(1 + 1 / n)


def best(points: Series) -> Loss:
    """The lowest loss, the first of equals."""
    return min(points, key=lambda p: p[1])


@dataclass(frozen=True)
class Excursion:
    """A rise of the loss above its best so far by more than noise, ended or not."""

    best: Loss
    start: Loss
    peak: Loss
    end: Loss | None
    """The first epoch that is back at the best, within noise; None if the run ended above it."""


def excursions(points: Series, noise: float) -> tuple[Excursion, ...]:
    """All excursions in order. Only the last can be open."""
    found: list[Excursion] = []
    lowest: Loss | None = None
    start = peak = base = None
    for point in points:
        if lowest is not None and relative(point[1], lowest[1]) > limit(noise):
            if start is None:
                start, peak, base = point, point, lowest
            elif peak is not None and point[1] > peak[1]:
                peak = point
        elif start is not None and peak is not None and base is not None:
            found.append(Excursion(best=base, start=start, peak=peak, end=point))
            start = None
        if lowest is None or point[1] < lowest[1]:
            lowest = point
    if start is not None and peak is not None and base is not None:
        found.append(Excursion(best=base, start=start, peak=peak, end=None))
    return tuple(found)


@dataclass(frozen=True)
class Rise:
    """A loss that ends above its best by more than noise."""

    best: Loss
    onset: Loss
    """The first of the epochs that all lie above the best by more than one standard deviation."""
    last: Loss
    evaluations: int
    """Evaluations since the best."""


def rise(points: Series, noise: float) -> Rise | None:
    """The rise of a loss that has left its best for good, judged on the epochs since the best; else None.

    It has left if the mean of the last n epochs lies above `limit(noise, n)`, for some n: one epoch far above, or
    several less so. A rise of 0.3 % an epoch, hardly more than the noise, is seen after six epochs.
    """
    if not points:
        return None
    lowest = best(points)
    after = tuple(p for p in points if p[0] > lowest[0])
    lifts = [relative(value, lowest[1]) for _, value in after]
    seen = any(fmean(lifts[-n:]) > limit(noise, n) for n in range(1, len(lifts) + 1))
    if not seen or lifts[-1] <= noise:
        return None
    onset = after[-1]
    for point, lift in zip(reversed(after), reversed(lifts), strict=True):
        if lift <= noise:
            break
        onset = point
    return Rise(best=lowest, onset=onset, last=after[-1], evaluations=len(after))


def log_gain(points: Series) -> float:
    """b of loss = a - b * ln(epoch) over the second half of the run (three epochs or more), a share of the last loss.

    Why this law: over 36 prefixes of the recorded runs it predicted a gain of 1.8 % from half as many epochs again,
    and 1.6 % came; a straight line predicted 3.0 %, 1/epoch 1.1 % (docs/diagnosis.md). The slope is the median of
    those between all pairs of epochs (Theil and Sen), which one noisy epoch does not change.
    """
    tail = points[-max(3, (len(points) + 1) // 2) :]
    logs = [(math.log(max(epoch, 1)), value) for epoch, value in tail]
    slopes = [(v - u) / (y - x) for (x, u), (y, v) in combinations(logs, 2) if y > x]
    return -median(slopes) / max(abs(tail[-1][1]), _SMALLEST) if slopes else 0.0


def calm(points: Series, noise: float) -> Series:
    """The curve without the epochs of excursions that came back, which say nothing about the pace."""
    left = [(move.start[0], move.end[0]) for move in excursions(points, noise) if move.end is not None]
    return tuple(p for p in points if not any(start <= p[0] < end for start, end in left))


def steady(points: Series) -> bool:
    """Whether a loss fell at every single epoch, of six at least, however little.

    By chance alone n values come in falling order once in n! times: for six once in 720, as rare as SIGNIFICANT
    standard deviations. A rate that is far too low looks like this: a line that falls by less than any noise.
    """
    return len(points) >= 6 and all(b[1] < a[1] for a, b in pairwise(points))


def straightness(points: Series) -> float:
    """Gain per epoch in the second half over that of the whole run: 1 for a straight line, 0 for a curve gone flat."""
    first, last = points[0], points[-1]
    middle = (first[0] + last[0]) / 2
    left = max((p for p in points if p[0] <= middle), key=lambda p: p[0])
    right = min((p for p in points if p[0] >= middle), key=lambda p: p[0])
    share = (middle - left[0]) / (right[0] - left[0]) if right[0] > left[0] else 0.0
    half = left[1] + share * (right[1] - left[1])
    whole = first[1] - last[1]
    return 2 * (half - last[1]) / whole if whole > 0 else 0.0
