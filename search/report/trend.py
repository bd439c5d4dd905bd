"""Whether a parameter and the loss go together: a rank correlation, and how much of it is chance."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

FEWEST_FOR_TREND = 8
"""Fewest trials for a rank correlation: with 7 even a perfect shuffle reaches 0.7 in one case of ten."""
RESAMPLES = 500
"""Bootstrap resamples of a correlation, which fix the ends of its interval to about 0.03; and shuffles of losses."""
CHANCE = 0.05
"""Largest share of shuffles for which something is not attributed to chance."""

Key = TypeVar("Key", bound=Hashable)
Matrix = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Spearman's rank correlation of a parameter with the lowest validation loss, and its 90 % bootstrap interval."""

    n: int
    rho: float
    low: float
    high: float
    chance: float
    """How often shuffled losses correlate as much, as `Table.chance` for all comparisons of the study."""

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero, and shuffling does not come to the same."""
        return (self.low > 0 or self.high < 0) and self.chance <= CHANCE


def trend_of(pairs: Iterable[tuple[Any, float | None]]) -> Trend | None:
    """The trend of (value of the parameter, loss) pairs; None where too few have both, or the parameter no number."""
    known = [(x, y) for x, y in pairs if isinstance(x, int | float) and not isinstance(x, bool) and y is not None]
    if len(known) < FEWEST_FOR_TREND or len({x for x, _ in known}) < 3:
        return None
    x, y = (np.unique(column, return_inverse=True)[1] for column in zip(*known, strict=True))
    n = len(x)
    rng = np.random.default_rng(0)  # seeded: the same records, the same interval
    picks = np.vstack([np.arange(n), rng.integers(0, n, size=(RESAMPLES, n))])
    rhos = _correlations(_ranks(x[picks]), _ranks(y[picks]))
    if np.isnan(rhos[0]):
        return None
    low, high = np.nanquantile(rhos[1:], (0.05, 0.95))
    shuffled = rng.permuted(np.tile(_ranks(y[None]), (RESAMPLES, 1)), axis=1)
    others = np.abs(_correlations(shuffled, _ranks(x[None])))
    chance = (1 + int((others >= abs(rhos[0]) * (1 - 1e-12)).sum())) / (1 + RESAMPLES)
    return Trend(n=n, rho=float(rhos[0]), low=float(low), high=float(high), chance=chance)


def _ranks(codes: Matrix) -> Matrix:
    """Ranks within each row of a matrix of small whole numbers, ties sharing their mean rank; shape (rows, n) both."""
    rows = np.arange(len(codes))[:, None]
    counts = np.zeros((len(codes), int(codes.max()) + 1))
    np.add.at(counts, (rows, codes), 1)
    mean_rank = np.cumsum(counts, axis=1) - (counts - 1) / 2
    ranks: Matrix = mean_rank[rows, codes]
    return ranks


def _correlations(a: Matrix, b: Matrix) -> Matrix:
    """Pearson's correlation of each row of `a` with that of `b`; NaN where either does not vary."""
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    rhos: Matrix = np.divide((a * b).sum(axis=1), scale, out=np.full(len(a), np.nan), where=scale > 0)
    return rhos


def holm(chances: Mapping[Key, float]) -> dict[Key, float]:
    """Chances corrected for their number by Holm's method (1979): the least times all of them, the next times one
    fewer, and so on."""
    found, least = {}, 0.0
    for place, key in enumerate(sorted(chances, key=lambda key: chances[key])):
        least = found[key] = min(1.0, max(least, (len(chances) - place) * chances[key]))
    return found
