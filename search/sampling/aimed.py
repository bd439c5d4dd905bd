"""`AimedSampler`: new trials get the configuration that a plan proposes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from search.sampling.params import distribution, root
from search.sampling.samplers import SeededByTrial
from search.space import param_name
from search.study import Study


class Proposes(Protocol):
    """What says which configuration begins next."""

    def propose(self, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        """Params of the configuration that should begin next, given all other trials of the study."""


class AimedSampler(BaseSampler):
    """Asks a plan for the params of each new trial. The plan draws by the study's seed and the trials before, so that
    an interrupted study samples what an undisturbed one would have.

    Args:
        study: The definition: its space.
        plan: What proposes.
    """

    def __init__(self, study: Study, plan: Proposes) -> None:
        self._plan = plan
        self._space = {param_name(field, param): distribution(param) for field, param in study.space.items()}
        # For what a trial given by hand leaves open in part.
        self._random = SeededByTrial(lambda seed: RandomSampler(seed=seed), study.seed)

    def reseed_rng(self) -> None:
        """Do nothing: what is drawn depends on the trials alone."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole space; nothing for a trial whose params are all given."""
        given = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        return {} if self._space.keys() <= given.keys() else dict(self._space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The plan's proposal."""
        if not search_space:
            return {}
        trials = {t.number: t for t in study.get_trials(deepcopy=False)}
        first = root(trials, trial)
        return self._plan.propose([t for number, t in trials.items() if number != trial.number and number != first])

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value, of a param that the space does not have."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Begin a trial."""
        self._random.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Do nothing: the plan reads what it knows from the study."""
