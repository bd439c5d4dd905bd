"""Which of the trials that wait is taken next: the longest, where trials train side by side.

Trials given by hand, handed over or interrupted are known before they begin, and so is how many optimizer steps each
has left. Steps of a trial come one after the other: one of batches of 2 that begins last trains on long after all
others, in passes that leave the machine idle. The longest first is the rule that keeps the end short (Graham 1969,
"Bounds on multiprocessing timing anomalies"); PLoRA (arXiv 2508.02932) plans its packs likewise. Numbers, seeds and
params are what they would be in any other order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial

from search import records
from search.storage.optuna_private import OrderedStudy
from search.study import Study
from trainer.common.errors import ConfigError


class LongestFirst(OrderedStudy):
    """A study whose `ask` takes the waiting trial with the most steps left; of equals the first.

    Args:
        name: Optuna's.
        storage: As `optuna.load_study` has it, and so the next two.
        sampler: Of new trials.
        pruner: Of running ones.
        definition: What decides how long its trials are.
        rows: Of the data folder, of which a trial takes `max_samples` at most.
    """

    def __init__(self, name: str, storage: Any, sampler: Any, pruner: Any, definition: Study, rows: int) -> None:
        super().__init__(name, storage, sampler, pruner)
        self._definition = definition
        self._rows = rows
        self.longest_first = False
        """Whether trials train side by side; one after the other, they keep the order of their numbers."""

    def in_order(self, waiting: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        """The longest in front, or as they are."""
        if not self.longest_first:
            return waiting
        return sorted(waiting, key=lambda trial: (-self.steps_left(trial), trial.number))

    def steps_left(self, trial: FrozenTrial) -> int:
        """Optimizer steps until the trial's last epoch; what is still to be sampled counts as the base has it."""
        given = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        try:
            config = self._definition.config(given, trial.user_attrs.get(records.OVERRIDES, {}))
        except (ConfigError, TypeError, ValueError):
            return 0  # somebody queued what cannot be run; who takes it will be told
        samples = min(config.max_samples or self._rows, self._rows)
        steps = math.ceil(samples / (config.batch_size * config.gradient_accumulation_steps))
        return steps * (config.num_epochs - len(trial.intermediate_values))
