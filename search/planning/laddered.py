"""Configurations for `--strategy rungs`: in turns a rung of a ladder of effective rates, and near the best so far.

The effective rate is the one steep direction of the space (docs/search-quality.md). On the ladder all else is what the
hand-run log recommends to begin with, so that its trials can be compared, and its rungs lie ever closer together over
a decade to either side of the prior: one that is wrong by half a decade costs little. Every other configuration varies
one of the best: what is not on the ladder, rank, batch size, dropout, is found there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import FrozenTrial

from search.planning.candidates import Candidates, Values, begun, key, left
from search.planning.comparable import Comparable
from search.planning.plan import number_counted
from search.planning.prior import Prior

if TYPE_CHECKING:
    from search.study import Study

REACH = 1.0
"""Decades of the ladder to either side of the prior."""
BEST = 3
"""Good trials one of which is varied."""
STEP = 0.2
"""Standard deviation in decades of the effective rate's step from a good one."""
TRIES = 20
"""Draws for a configuration that has not begun."""


class Laddered:
    """Proposes; depends on the study's seed and the trials alone.

    Args:
        study: The definition.
        prior: Of the effective rate.
    """

    def __init__(self, study: Study, prior: Prior) -> None:
        self._study, self._prior = study, prior
        self._comparable = Comparable(study)
        self._candidates = Candidates(study.space, study.base_config().model_dump(mode="json"))
        self._shift = float(np.random.default_rng(study.seed).uniform())

    def propose(self, trials: Sequence[FrozenTrial]) -> Values:
        """Params of the configuration that should begin next.

        Args:
            trials: All trials of the study but the one that is to get the params.
        """
        number = number_counted(trials)
        rng = np.random.default_rng((self._study.seed, number))
        taken = begun(trials)
        good = self._good(trials)
        found = self._ladder(rng, number // 2) if number % 2 == 0 else self._near(rng, good)
        for _ in range(TRIES):
            if key(found) not in taken:
                return found
            found = self._near(rng, good)
        rest = left(self._study.space, taken)
        return rest[int(rng.integers(len(rest)))] if rest else found

    def _ladder(self, rng: np.random.Generator, rung: int) -> Values:
        """The rung of this number, from 0."""
        place = (self._shift + van_der_corput(rung)) % 1
        return self._candidates.sound_at(rng, self._prior.centre + REACH * (2 * place - 1))

    def _near(self, rng: np.random.Generator, good: Sequence[Values]) -> Values:
        """A variant of one of the best, or without any a draw from the prior."""
        if not good:
            return self._candidates.any_at(rng, float(rng.normal(self._prior.centre, self._prior.width)))
        return self._candidates.varied(rng, good[int(rng.integers(len(good)))], STEP)

    def _good(self, trials: Sequence[FrozenTrial]) -> list[Values]:
        """Params of the best trials by lowest validation loss, as far as the space has them."""
        lowest = []
        for trial in self._comparable.among(trials):
            losses = [loss for loss in trial.intermediate_values.values() if math.isfinite(loss)]
            params = self._comparable.params(trial)
            if losses and len(params) == len(self._study.space):
                lowest.append((min(losses), trial.number, params))
        return [params for _, _, params in sorted(lowest, key=lambda each: each[:2])[:BEST]]


def van_der_corput(number: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, ...: evenly spread however many are taken (van der Corput 1935)."""
    place, step = 0.0, 0.5
    while number:
        place, step, number = place + step * (number % 2), step / 2, number // 2
    return place
