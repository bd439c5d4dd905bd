"""A study without its repeats, or with comparable trials alone: what samplers, pruners and plans see of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from search import records
from search.leaderboard import samples_of
from search.planning.plan import is_repeat
from search.storage.optuna_private import FilteredStudy


def searched(study: optuna.Study) -> optuna.Study:
    """The study with the trials of the search alone."""
    return FilteredStudy(study, lambda trial: not is_repeat(trial))


def alike(study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
    """The study, as it is now, with the trials of the search alone whose losses can be compared with this one's.

    They are on the same samples. One that was lost and taken up again is left out: its successor has its reports, and
    its rungs of a halving, too.
    """
    trials = {each.number: each for each in study.get_trials(deepcopy=False)}
    resumed = {each.user_attrs.get(records.RESUMES) for each in trials.values()}

    def samples(of: FrozenTrial) -> tuple[Any, ...]:
        before = trials.get(of.user_attrs.get(records.RESUMES, -1))
        if records.CONFIG not in of.user_attrs and before is not None:
            return samples(before)  # queued again, and not begun
        return samples_of(of.user_attrs, of.user_attrs.get(records.CONFIG) or {})

    own = samples(trial)
    kept = {
        number
        for number, each in trials.items()
        if number not in resumed and not is_repeat(each) and samples(each) == own
    }
    return FilteredStudy(study, lambda each: each.number in kept or each.number == trial.number)


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
