"""What is known of good effective rates before a study begins: from published runs, and from earlier studies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHARPNESS = 0.01
"""A run whose loss is 1 % above the best of its study counts 1/e as much."""
LEAST_WIDTH = 0.3
"""Decades. A task of another size has its optimum elsewhere: -2.6 to -2.3 on the embedded model's three."""
DEFAULT_WIDTH = 0.5


@dataclass(frozen=True)
class Prior:
    """A normal distribution of log10 of the best effective rate."""

    centre: float = -2.6
    """The author of the hand-run log published four complete runs of InstructBLIP-FlanT5-XL on 2,068 images of RSICap
    (tests/data/recorded-runs.json): after 6 epochs the lowest validation losses are at -2.30 and -2.43, after 8 at
    -2.30 and -2.86, after 15 at -2.73. The embedded model, 1,800 times smaller, has its optimum at -2.6 to -2.3."""
    width: float = DEFAULT_WIDTH
    """Standard deviation in decades."""


def from_runs(runs: Iterable[tuple[float, float]]) -> Prior | None:
    """The prior that runs of one study give: the better a run, the more its effective rate counts.

    Args:
        runs: (log10 of the effective rate, lowest validation loss) of each, losses comparable with each other.

    Returns:
        None without a run whose rate and loss are finite.
    """
    known = [(z, math.log(loss)) for z, loss in runs if math.isfinite(z) and math.isfinite(loss) and loss > 0]
    if not known:
        return None
    lowest = min(loss for _, loss in known)
    weights = [math.exp(-(loss - lowest) / SHARPNESS) for _, loss in known]
    total = sum(weights)
    centre = sum(w * z for w, (z, _) in zip(weights, known, strict=True)) / total
    spread = math.sqrt(sum(w * (z - centre) ** 2 for w, (z, _) in zip(weights, known, strict=True)) / total)
    effective = total**2 / sum(w * w for w in weights)
    return Prior(centre, max(LEAST_WIDTH, math.hypot(spread, DEFAULT_WIDTH / math.sqrt(1 + effective))))


def combined(priors: Sequence[Prior]) -> Prior:
    """The product of several priors that know of each other's studies nothing, never narrower than `LEAST_WIDTH`."""
    precision = sum(1 / p.width**2 for p in priors)
    centre = sum(p.centre / p.width**2 for p in priors) / precision
    return Prior(centre, max(LEAST_WIDTH, math.sqrt(1 / precision)))
