"""Repeats: the leaders' trials again, with other seeds and splits, queued once the search itself has nothing left.

They are asked for a whole round at a time, and the next round once all of it has ended: what is asked for depends on
losses alone, never on who was faster. Every worker and host comes to the same, and the study's lock sees to it that
one of them queues it.
"""

from __future__ import annotations

import logging
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from search import records
from search.leaderboard import searched
from search.planning.budget import Budget
from search.planning.plan import is_repeat
from search.records import TrialRecord
from search.storage import lifecycle
from search.study import Study
from search.verdict.leaders import Rules, judge, seed_of
from search.verdict.race import Cell
from trainer.common.errors import DataError
from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.dataset import Examined

log = logging.getLogger("search.workers.repeats")


def wanted(study: optuna.Study, rules: Rules, budget: Budget) -> tuple[Cell, ...]:
    """The repeats to be queued now: none while the search has trials to begin, to run or to give up.

    Args:
        study: The study; read once.
        rules: How it is decided.
        budget: Of the whole study.
    """
    trials = study.get_trials(deepcopy=False)
    own = [trial for trial in trials if not is_repeat(trial)]
    if budget.new_left(own) or any(not trial.state.is_finished() for trial in own):
        return ()
    return judge(lifecycle.records_of(trials), rules).wanted


class Repeats:
    """Queues the repeats of one study.

    Args:
        study: Optuna's.
        definition: Ours.
        rules: How it is decided.
        budget: Of the whole study.
        examined: The data, which say whether another split is possible.
    """

    def __init__(
        self, study: optuna.Study, definition: Study, rules: Rules, budget: Budget, examined: Examined
    ) -> None:
        self._study = study
        self._definition = definition
        self._rules = rules
        self._budget = budget
        self._examined = examined

    def enqueue(self) -> bool:
        """Queue those that are wanted now, the study's lock held; whether there are any."""
        cells = wanted(self._study, self._rules, self._budget)
        if not cells:
            return False
        trials = {trial.number: trial for trial in self._study.get_trials(deepcopy=False)}
        known = {record.number: record for record in lifecycle.records_of(tuple(trials.values()))}
        taken = {record.config.get("seed") for record in searched(tuple(known.values()))}
        for number, block in cells:
            self._study.add_trial(self._repeat(trials[number], known[number], block, taken))
        log.info("repeats queued (trial, block): %s", cells)
        return True

    def _repeat(self, trial: FrozenTrial, record: TrialRecord, block: int, taken: set[Any]) -> FrozenTrial:
        """A trial that waits to repeat another one."""
        given = trial.user_attrs.get(records.OVERRIDES, {})
        base = self._definition.base_config()
        seeds = {"seed": seed_of(block, base.seed, taken), "split_seed": base.split_seed + block}
        seeds |= self._definition.unscreened()  # what is decided is decided in the base's own precision
        config = self._definition.config(trial.params, {**given, **seeds})
        if not self._splits_anew(config):
            del seeds["split_seed"]
        return create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={
                records.REPEAT_OF: trial.number,
                records.BLOCK: block,
                records.TRAINS_TO: record.best_epoch,
                records.OVERRIDES: {**given, **seeds},
            },
        )

    def _splits_anew(self, config: TrainConfig) -> bool:
        """Whether the data can be split otherwise: not if they say themselves who validates, or are too few."""
        try:
            return dataset.split(dataset.usable(self._examined, config), config).facts.rule != "given"
        except DataError:
            return False
