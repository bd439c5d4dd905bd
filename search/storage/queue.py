"""Which trial comes next: one that was interrupted, a paused one that is worth it, or a new one.

Of interrupted, queued and handed-over trials the longest is taken first, where trials train side by side.

The optimizer steps that a waiting trial has left are known: it was given by hand, handed over or interrupted. Steps of
a trial come one after the other, so one with batches of 2 that begins last trains on long after all others, in passes
that leave the machine idle. Taking the longest first keeps the end short (Graham 1969, "Bounds on multiprocessing
timing anomalies"); PLoRA (arXiv 2508.02932) plans its packs likewise. Numbers, seeds and params are the same in any
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from search import records
from search.planning.budget import Budget
from search.planning.plan import Plan, is_paused, is_repeat
from search.pruning import plan_of
from search.records import lowest
from search.storage.optuna_private import OrderedStudy
from search.storage.searched import OfTheSearch
from search.study import Study
from trainer.common.errors import ConfigError


class LongestFirst(OrderedStudy):
    """A study whose `ask` takes the waiting trial with the most steps left; among equals the first.

    A paused trial is taken only when the pruner's plan says so: `has_next` decides, the `ask` after it obeys.

    Args:
        name: Optuna's name of the study.
        storage: See `optuna.load_study`, also for the next two.
        sampler: Samples the params of new trials.
        pruner: Stops running ones.
        definition: Decides how long its trials are.
        rows: Rows in the data folder; a trial uses at most `max_samples` of them.
    """

    def __init__(self, name: str, storage: Any, sampler: Any, pruner: Any, definition: Study, rows: int) -> None:
        super().__init__(name, storage, OfTheSearch(sampler), pruner)
        self._definition = definition
        self._rows = rows
        self.longest_first = False
        """Whether trials train side by side; if not, they are taken in the order of their numbers."""
        self.repeats = True
        """Whether repeats of the leaders are wanted: those that an earlier search has queued wait if not."""
        self.plan: Plan | None = plan_of(pruner)
        self.given_up: str | None = None
        """Why the trial of the next `ask`, a paused one, is to end."""
        self._resumed: int | None = None

    def has_next(self, budget: Budget) -> bool:
        """Whether the next `ask` has a trial to give, and which; the study's lock is held. Reads the trials once.

        Args:
            budget: Of the whole study.
        """
        trials = self.get_trials(deepcopy=False)
        self._resumed = self.given_up = None
        if any(t.state == TrialState.WAITING and not self._is_paused(t) and self._wanted(t) for t in trials):
            return True
        trials = [t for t in trials if not is_repeat(t)]
        new_left = budget.new_left(trials, self.plan)
        waiting = [t for t in trials if self._is_paused(t)]
        if not waiting or self.plan is None:
            return new_left
        spent = budget.is_spent(trials)
        if not spent:
            self._resumed = self.plan.resume(trials, new_left=new_left, left=budget.left(trials))
        if self._resumed is None and not new_left and not any(t.state == TrialState.RUNNING for t in trials):
            best = min(waiting, key=lambda t: (lowest(t.intermediate_values) or (math.inf,), t.number))
            self._resumed = best.number  # the best first: it may be the study's, see `pruning.settled`
            self.given_up = budget.spent() if spent else self.plan.give_up(trials, best)
        return new_left or self._resumed is not None

    def _is_paused(self, trial: FrozenTrial) -> bool:
        """Whether the trial waits for the plan; without one, it just goes on."""
        return self.plan is not None and is_paused(trial)

    def _wanted(self, trial: FrozenTrial) -> bool:
        return self.repeats or not is_repeat(trial)

    def in_order(self, waiting: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        """The longest first if `longest_first`, else unchanged; of paused ones, the one that `has_next` chose."""
        waiting = [t for t in waiting if self._wanted(t) and (not self._is_paused(t) or t.number == self._resumed)]
        if not self.longest_first:
            return waiting
        return sorted(waiting, key=lambda trial: (-self.steps_left(trial), trial.number))

    def steps_left(self, trial: FrozenTrial) -> int:
        """Optimizer steps until the trial's last epoch; params still to be sampled count with the base's values."""
        given = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        try:
            config = self._definition.config(given, trial.user_attrs.get(records.OVERRIDES, {}))
        except (ConfigError, TypeError, ValueError):
            return 0  # the queued params cannot be run; the worker that takes the trial reports it
        samples = min(config.max_samples or self._rows, self._rows)
        steps = math.ceil(samples / (config.batch_size * config.gradient_accumulation_steps))
        epochs: int = trial.user_attrs.get(records.TRAINS_TO, config.num_epochs)
        return steps * (epochs - len(trial.intermediate_values))
