"""A study without its repeats: what samplers, pruners and plans see of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from search.planning.plan import is_repeat
from search.storage.optuna_private import FilteredStudy


def searched(study: optuna.Study) -> optuna.Study:
    """The study with the trials of the search alone."""
    return FilteredStudy(study, lambda trial: not is_repeat(trial))


class OfTheSearch(BaseSampler):
    """Shows a sampler the trials of the search alone, and leaves repeats, which have all their params, to nobody.

    Args:
        sampler: Samples the search's trials.
    """

    def __init__(self, sampler: BaseSampler) -> None:
        self._sampler = sampler
        self._view: tuple[optuna.Study, optuna.Study] | None = None

    def _of(self, study: optuna.Study) -> optuna.Study:
        if self._view is None or self._view[0] is not study:
            self._view = (study, searched(study))
        return self._view[1]

    def reseed_rng(self) -> None:
        """See Optuna's BaseSampler, also for what follows."""
        self._sampler.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Begin a trial."""
        if not is_repeat(trial):
            self._sampler.before_trial(self._of(study), trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Distributions of the params that are sampled together."""
        return {} if is_repeat(trial) else self._sampler.infer_relative_search_space(self._of(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of the params that are sampled together."""
        return {} if is_repeat(trial) else self._sampler.sample_relative(self._of(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The value of a param by itself."""
        return self._sampler.sample_independent(self._of(study), trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """End a trial."""
        if not is_repeat(trial):
            self._sampler.after_trial(self._of(study), trial, state, values)
