"""Pausing by rungs: a trial waits after epochs 1, 3, 9, ... and goes on if it is among the best third there.

ASHA of the promotion type (Li et al. 2018, arXiv 1810.05934): it compares raw losses of the same epoch. Once no
configuration is left to begin, the leaders are trained to their end, and half of a budget of epochs is kept for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from optuna.trial import FrozenTrial, TrialState

from search.planning.plan import Plan, paused

FLAT = 0.01
"""Losses that lie less above a trial's best, relatively, do not rise: an evaluation of 32 samples has a noise of 0.4
to 1 %. If three epochs without a new best end a trial that has won its rungs, the study's best lies 1.4 % higher in
test loss (docs/search-quality.md): validation losses are flat where test losses still fall."""

RISEN, LATEST = 0.05, 3
"""Where so many of the latest losses all lie this far above a trial's best, relatively, it rises, however flat it was
before: one epoch as low as the best would otherwise keep it to its end. Noise alone does not do it."""

LEADERS = 5
"""Trials that go on to their end once no configuration is left to begin: as many as the verdict repeats at most.

Of five real runs of one size the best is the last after their first epoch (tests/data/recorded-runs.json): with fewer
it would be given up. On the tables two are enough for 12 trials and cost 54 epochs, five cost 97 and are surer of 40
(docs/search-quality.md)."""


class RungPlan(Plan):
    """Goes on with one in `one_of` of those that reached a rung; at the end with the leaders.

    Args:
        num_epochs: Epochs of the longest trial.
        first: Epoch of the first rung.
        one_of: One trial in this many goes on; each rung is this many times later than the one before.
        leaders: How many go on to their end once no configuration is left to begin.
        among: Those of all trials that can be compared (`Comparable.among`); by default all can.
        planned: Epochs of one of them, None if it does not say (`Comparable.planned`); by default the longest trial's.
    """

    def __init__(
        self,
        num_epochs: int,
        *,
        first: int = 1,
        one_of: int = 3,
        leaders: int = LEADERS,
        among: Callable[[Sequence[FrozenTrial]], Sequence[FrozenTrial]] = list,
        planned: Callable[[FrozenTrial], int | None] = lambda trial: None,
    ) -> None:
        self._num_epochs, self._among, self._planned = num_epochs, among, planned
        self._rungs = []
        epoch = first
        while epoch < num_epochs:
            self._rungs.append(epoch)
            epoch *= one_of
        self._one_of, self._most_leaders = one_of, leaders

    def pause(
        self, trials: Sequence[FrozenTrial], trial: FrozenTrial, *, new_left: bool, left: int | None = None
    ) -> str | None:
        """See `Plan.pause`: at a rung, unless it is among the best there. One that cannot be compared goes on."""
        epoch = max(trial.intermediate_values)
        if epoch not in self._rungs or epoch >= self._end(trial):
            return None
        field = self._among([*(t for t in trials if t.number != trial.number), trial])
        if not _has(field, trial):
            return None
        by_rungs, leaders = self._goes_on(field, new_left, left)
        if _has(leaders, trial) or (by_rungs and self._is_among_best(field, trial, epoch)):
            return None
        if by_rungs:
            return f"not among the best third of those that reached epoch {epoch}"
        return f"the {left} epochs that are left go to leaders that can reach their end"

    def may_gain(self, trials: Sequence[FrozenTrial], trial: FrozenTrial) -> bool:
        """See `Plan.may_gain`: while a loss since its best was as low within noise and the latest are near."""
        losses = [loss for _, loss in sorted(trial.intermediate_values.items()) if math.isfinite(loss)]
        if not losses:
            return False
        best = min(losses)
        since = losses[losses.index(best) + 1 :]
        flat = min(since, default=best) <= best * (1 + FLAT)
        return flat and min(losses[-LATEST:]) <= best * (1 + RISEN)

    def resume(self, trials: Sequence[FrozenTrial], *, new_left: bool, left: int | None = None) -> int | None:
        """See `Plan.resume`: of those that are among the best of their rung, the one that has come furthest."""
        field = self._among(trials)
        by_rungs, leaders = self._goes_on(field, new_left, left)
        worth = paused(field) if by_rungs else []
        worth = [t for t in worth if self._is_among_best(field, t, max(t.intermediate_values))] or paused(leaders)
        return max(worth, key=lambda t: (max(t.intermediate_values), -t.number)).number if worth else None

    def wanted(self, trials: Sequence[FrozenTrial]) -> int:
        """See `Plan.wanted`: what the leaders lack to their end."""
        return sum(map(self._lacks, self._leaders(self._among(trials))))

    def expected(self, number: int) -> int:
        """Epochs that so many configurations come to, if none ends by itself.

        On the tables 40 of 20 epochs took 156 and 158 (median of 20 studies; this says 151).
        """
        begun, epochs, before = number, 0, 0
        ends: list[int] = []
        for rung in (*self._rungs, self._num_epochs):
            epochs += begun * (rung - before)
            goes_on = begun // self._one_of if rung < self._num_epochs else 0
            ends += [rung] * (begun - goes_on)
            begun, before = goes_on, rung
        return epochs + sum(self._num_epochs - end for end in sorted(ends, reverse=True)[: self._most_leaders])

    def give_up(self, trials: Sequence[FrozenTrial], trial: FrozenTrial) -> str:
        """See `Plan.give_up`."""
        epoch = max(trial.intermediate_values)
        return f"paused after epoch {epoch}, and not among the best third of those that reached it until the end"

    def _goes_on(
        self, field: Sequence[FrozenTrial], new_left: bool, left: int | None
    ) -> tuple[bool, list[FrozenTrial]]:
        """(whether the best of a rung go on, the leaders that do); a budget's end is for leaders until they ended."""
        if new_left:
            return True, []
        leaders = self._leaders(field, left)
        return left is None or all(t.state.is_finished() for t in leaders), leaders

    def _is_among_best(self, field: Sequence[FrozenTrial], trial: FrozenTrial, epoch: int) -> bool:
        """Whether the trial is among the best `1 / one_of` at this epoch; the only one there is not."""
        values = [
            t.intermediate_values[epoch] for t in field if epoch in t.intermediate_values and t.number != trial.number
        ]
        value = trial.intermediate_values[epoch]
        if not math.isfinite(value):
            return False
        return sum(other < value for other in values) < (len(values) + 1) // self._one_of

    def _leaders(self, field: Sequence[FrozenTrial], left: int | None = None) -> list[FrozenTrial]:
        """The trials with the lowest validation losses; of those, the ones that so many epochs bring to their end.

        Five that share what is enough for two all stay on their way: of eight side by side with the epochs of three
        full trainings, the best lay 1.2 % above the table's, with this 0.4 % (docs/search-quality.md).
        """
        lowest = []
        for trial in field:
            losses = [loss for loss in trial.intermediate_values.values() if math.isfinite(loss)]
            if losses:
                lowest.append((min(losses), trial.number, trial))
        leaders = [trial for _, _, trial in sorted(lowest, key=lambda each: each[:2])[: self._most_leaders]]
        if left is None:
            return leaders
        numbers = {trial.number for trial in leaders}
        left -= sum(self._to_next_rung(t) for t in field if t.state == TrialState.RUNNING and t.number not in numbers)
        chosen, unfinished = [], 0
        for trial in leaders:
            lacks = self._lacks(trial)
            if lacks <= left or not unfinished:  # the first goes on in any case, as far as it comes
                chosen.append(trial)
                left -= lacks
                unfinished += lacks > 0
        return chosen

    def _to_next_rung(self, trial: FrozenTrial) -> int:
        """Epochs until it pauses, if it does."""
        epoch = max(trial.intermediate_values, default=0)
        end = self._end(trial)
        return max(0, min(next((rung for rung in self._rungs if rung > epoch), end), end) - epoch)

    def _lacks(self, trial: FrozenTrial) -> int:
        """Epochs to its end."""
        return 0 if trial.state.is_finished() else max(0, self._end(trial) - max(trial.intermediate_values))

    def _end(self, trial: FrozenTrial) -> int:
        """The trial's last epoch, which a space may sample."""
        return self._planned(trial) or self._num_epochs


def _has(field: Sequence[FrozenTrial], trial: FrozenTrial) -> bool:
    return any(each.number == trial.number for each in field)
