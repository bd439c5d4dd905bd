"""How certain figures are, and whether two candidates differ: by resampling the images.

Images, not captions or words, are what another data set would have other ones of: Koehn 2004, "Statistical
significance tests for machine translation evaluation". Tiles of one scene are not independent, and intervals would be
too narrow, so that whole scenes are drawn where scenes are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from search.evaluation.metrics import NAMES, Scores, figures

SAMPLES = 1_000
"""Resamplings: the ends of an interval of 95 % then lie 25 samples from the outside."""
SEED = 20_150_607
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A metric with its interval of `LEVEL`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Another candidate minus a first one, in one metric."""

    value: float
    low: float
    high: float
    p: float
    """Probability of a difference as large where which caption is whose does not matter (paired permutation)."""

    @property
    def differs(self) -> bool:
        """Whether chance is ruled out at `LEVEL`."""
        return self.p < 1 - LEVEL


def estimates(scores: Scores, scenes: Sequence[str] | None = None) -> dict[str, Estimate]:
    """The metrics of a candidate with bootstrap intervals.

    Args:
        scores: of the candidate.
        scenes: the scene of each image; None where each image stands for itself.
    """
    found, sampled = scores.values(), scores.weighted(_bootstrap(_units(len(scores), scenes)))
    return {name: Estimate(found[name], *_ends(sampled[name])) for name in NAMES}


def estimate_of_sums(
    counts: np.ndarray, value: Callable[[np.ndarray], np.ndarray], scenes: Sequence[str] | None = None
) -> Estimate:
    """A metric of summed counts with its bootstrap interval.

    Args:
        counts: (images, counts).
        value: the metric of sums, (samples, counts) -> (samples,).
        scenes: as of `estimates`.
    """
    own = np.ones((1, len(counts)))
    found = value(np.concatenate([own, _bootstrap(_units(len(counts), scenes))]) @ counts)
    return Estimate(float(found[0]), *_ends(found[1:]))


def differences(one: Scores, other: Scores, scenes: Sequence[str] | None = None) -> dict[str, Difference]:
    """`other` minus `one` on the same images: paired bootstrap for the interval, paired permutation for p."""
    assert len(one) == len(other)
    units = _units(len(one), scenes)
    weights = _bootstrap(units)
    ours, theirs = one.weighted(weights), other.weighted(weights)
    # Permutations: each scene's captions change sides or not.
    swapped = (np.random.default_rng(SEED).random((SAMPLES, len(units))) < 0.5) @ units.astype(float)
    there, here = _mixed(one, other, swapped), _mixed(other, one, swapped)
    result = {}
    for name, (low, high) in {name: _ends(theirs[name] - ours[name]) for name in NAMES}.items():
        value = other.values()[name] - one.values()[name]
        # The data themselves are one of the permutations, so that p is never 0.
        as_large = 1 + int((np.abs(here[name] - there[name]) >= abs(value) - 1e-12).sum())
        result[name] = Difference(value, low, high, as_large / (SAMPLES + 1))
    return result


def _mixed(one: Scores, other: Scores, swapped: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of `one` with the captions of `other` where `swapped`, (samples, images), is 1."""
    pairs = ((one.counts, other.counts), (one.rouge_l, other.rouge_l), (one.cider_d, other.cider_d))
    counts, rouge_l, cider_d = (a.sum(0) + swapped @ (b - a) for a, b in pairs)
    return figures(counts, rouge_l, cider_d, np.full(len(swapped), len(one)))


def _units(size: int, scenes: Sequence[str] | None) -> np.ndarray:
    """(units, images): 1 where an image belongs to a unit, which is a scene, or the image alone."""
    if scenes is None:
        return np.eye(size)
    numbers = {scene: number for number, scene in enumerate(dict.fromkeys(scenes))}
    units = np.zeros((len(numbers), size))
    units[[numbers[scene] for scene in scenes], range(size)] = 1
    return units


def _bootstrap(units: np.ndarray) -> np.ndarray:
    """(samples, images): how often each is drawn. As many units as there are, with repetition."""
    drawn = np.random.default_rng(SEED).multinomial(len(units), np.full(len(units), 1 / len(units)), size=SAMPLES)
    return drawn @ units  # type: ignore[no-any-return]


def _ends(values: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values, (tail, 100 - tail))
    return float(low), float(high)
