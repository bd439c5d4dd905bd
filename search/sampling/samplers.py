"""From a study's search space to the params of its next trial, through Optuna's samplers.

    suggest         the params of an asked trial, in the order of the space
    make_sampler    the sampler of a study and `--strategy`
    SeededByTrial   a study that was interrupted samples what an undisturbed one would have
    KnownSpaceTPE   TPE that need not find the space out from the trials
    mark_constraints  what a failed trial violated, so that TPE keeps away from there

The staged strategy is in `search.sampling.staged`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from search import records
from search.errors import StudyError
from search.space import Choice, Float, Int, Multiple, Param, param_name
from search.study import Study
from trainer.common.errors import nearest

STRATEGIES = ("joint", "staged")
"""Values of `--strategy`."""

N_STARTUP_TRIALS = 5
"""Trials that TPE samples at random before it models anything; Optuna's default is 10.

A study here has a dozen trials: with 10 all but two of them would be random. Measured on a smooth surface with a cliff
over rsicap_mini's space, noise 0.003, 100 seeds of 12 trials: mean best 1.3114 with 3, 1.3120 with 5, 1.3130 with 10,
each +-0.0007. So fewer is no worse, and perhaps better; 5 keeps some spread in six dimensions. A constant and not a
share of the budget, so that a study continued with more trials samples what a longer one would have.
"""

CONSTRAINTS = (records.NON_FINITE, records.OUT_OF_MEMORY)
"""Names of the constraints that a trial can violate."""


def distribution(param: Param) -> BaseDistribution:
    """Optuna's distribution of a param; for a Multiple, of its factors."""
    match param:
        case Float():
            return FloatDistribution(param.low, param.high, log=param.log)
        case Int():
            return IntDistribution(param.low, param.high, log=param.log)
        case Choice():
            return CategoricalDistribution(param.values)
        case Multiple():
            return CategoricalDistribution(param.factors)


def suggest(trial: optuna.Trial, study: Study) -> dict[str, Any]:
    """The trial's params by Optuna's names, in the order of the space.

    Params that the trial has already (queued, parked, requeued) are returned as they are.
    """
    params: dict[str, Any] = {}
    for field, param in study.space.items():
        name = param_name(field, param)
        match param:
            case Float():
                params[name] = trial.suggest_float(name, param.low, param.high, log=param.log)
            case Int():
                params[name] = trial.suggest_int(name, param.low, param.high, log=param.log)
            case Choice():
                params[name] = trial.suggest_categorical(name, param.values)
            case Multiple():
                params[name] = trial.suggest_categorical(name, param.factors)
    return params


def mark_constraints(trial: optuna.Trial, violated: str | None) -> None:
    """Record which constraint the trial violated, if any; to be called once, before it is told as PRUNED or COMPLETE.

    TPE ranks a trial by the sum of its positive constraint values, whatever its state among COMPLETE and PRUNED, and
    a trial without any as feasible. The others are set to 0 all the same, so that dashboards show them as held.
    FAIL would be invisible to it: with the optimum beside a cliff of NaN, 45 of 50 trials fell off told as FAIL, 20
    told as PRUNED (mean of 8 seeds, tests/search/sampling/test_samplers.py).

    Raises:
        ValueError: there is no such constraint.
    """
    if violated is not None and violated not in CONSTRAINTS:
        raise ValueError(f"constraints are {', '.join(CONSTRAINTS)}, but got {violated=}.")
    for name in CONSTRAINTS:
        trial.set_constraint(name, 1.0 if name == violated else 0.0)


def make_sampler(study: Study, strategy: str = "joint", n_trials: int | None = None) -> BaseSampler:
    """The sampler of a study.

    Args:
        study: Its space, kind of sampler and seed.
        strategy: `joint` samples all params from the first trial on, `staged` stage by stage.
        n_trials: Budget that the stages share; None for the study's own.

    Raises:
        StudyError: an unknown strategy, or one that the kind of sampler or the space cannot follow.
    """
    if strategy not in STRATEGIES:
        raise StudyError(
            f"there is no strategy {strategy!r}{nearest(strategy, STRATEGIES)}; known: {', '.join(STRATEGIES)}"
        )
    if study.sampler == "grid":
        if strategy != "joint":
            raise StudyError(
                f"the study {study.name!r} is a grid, which has no stages: leave out --strategy {strategy}"
            )
        return GridInOrder(study)
    if strategy == "staged":
        from search.sampling.staged import StagedSampler  # which builds on this module

        return StagedSampler(study, study.n_trials if n_trials is None else n_trials)
    return SeededByTrial(lambda seed: base_sampler(study, seed), study.seed)


def base_sampler(study: Study, seed: int) -> BaseSampler:
    """A new TPE or random sampler of this seed."""
    if study.sampler == "random":
        return RandomSampler(seed=seed)
    return KnownSpaceTPE(study, seed)


def grid_size(study: Study) -> int | None:
    """How many points a grid study has, its trials given by hand apart; None for other studies."""
    return math.prod(map(len, _grid(study).values())) if study.sampler == "grid" else None


class SeededByTrial(BaseSampler):
    """Hands each trial to a sampler of its own, seeded by the study's seed and the trial's place.

    A sampler made once and seeded once would, after a restart, draw its first samples again. This one samples for a
    trial what it would have sampled in a study never interrupted: with one worker, the same seed gives the same study
    however often it is stopped. The place is the trial's number but for trials that take up another's work, which
    have the place of the first of them and take none away.

    Args:
        make: Makes the sampler of one trial from a seed.
        seed: The study's seed.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make = make
        self._seed = seed
        self._latest: tuple[int, BaseSampler] | None = None

    def build(self, study: optuna.Study, trial: FrozenTrial, seed: int) -> BaseSampler:
        """The sampler of this trial."""
        return self._make(seed)

    def _of(self, study: optuna.Study, trial: FrozenTrial) -> BaseSampler:
        if self._latest is None or self._latest[0] != trial._trial_id:
            seed = np.random.SeedSequence((self._seed, place(study, trial))).generate_state(1)[0]
            self._latest = (trial._trial_id, self.build(study, trial, int(seed)))
        return self._latest[1]

    def reseed_rng(self) -> None:
        """Nothing: seeds are the trials'. Optuna calls this in threads it starts, whose trials differ anyway."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Begin a trial, new or taken up again."""
        self._latest = None
        self._of(study, trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The params that are sampled together."""
        return self._of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of the params that are sampled together."""
        return self._of(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The value of a param by itself."""
        return self._of(study, trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Nothing: what TPE and random sampling know, they read from the study."""


class KnownSpaceTPE(TPESampler):
    """Optuna's TPE, told which params are sampled together.

    Optuna finds out by comparing the distributions of all finished trials: afresh for each trial, as each has a
    sampler of its own, and for 0.2 s where there are 10,000 (docs/scaling.md). A study here has one
    definition, which every trial's params follow, so the answer is known: its whole space.

    Args:
        study: The space.
        seed: The seed of one trial.
    """

    def __init__(self, study: Study, seed: int) -> None:
        super().__init__(n_startup_trials=N_STARTUP_TRIALS, seed=seed)
        found = {param_name(field, param): distribution(param) for field, param in study.space.items()}
        # In Optuna's order, which decides what each of the generator's numbers is drawn for.
        self._space = {name: found[name] for name in sorted(found) if not found[name].single()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The study's space. While too few trials have finished, TPE samples none of it together."""
        return dict(self._space)


class GridInOrder(GridSampler):
    """Optuna's grid sampler, walking through the shuffled grid by the trials' places.

    Optuna's own takes points by trial number, at random once numbers and points got out of step (trials given by
    hand, requeued ones), and calls `Study.stop`, which only `Study.optimize` allows. Here each point comes once,
    in an order that only the seed decides, with any number of workers. Past the last point it begins again:
    `grid_size` says where a study should end.

    Args:
        study: A study whose params are all a Choice or a Multiple.

    Raises:
        StudyError: params of it are ranges.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(_grid(study), seed=study.seed)
        self._random = SeededByTrial(lambda seed: RandomSampler(seed=seed), study.seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Give a sampled trial its point of the grid."""
        if "grid_id" in trial.system_attrs or "fixed_params" in trial.system_attrs:
            return
        trials = {t.number: t for t in study.get_trials(deepcopy=False)}
        before = [t for number, t in trials.items() if number < root(trials, trial)]
        by_hand = sum("fixed_params" in t.system_attrs and _is_first(t) for t in before)
        point = (place(study, trial) - by_hand) % len(self._all_grids)
        study._storage.set_trial_system_attr(trial._trial_id, "search_space", self._search_space)
        study._storage.set_trial_system_attr(trial._trial_id, "grid_id", point)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The point's value, or one at random where a trial given by hand names none."""
        if "grid_id" not in trial.system_attrs:
            return self._random.sample_independent(study, trial, param_name, param_distribution)
        return super().sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Nothing: who asks for trials knows how many there are to be."""


def place(study: optuna.Study, trial: FrozenTrial) -> int:
    """The trial's place in the study had none been lost: its number, or its first predecessor's, less the
    trials before it that took up another's work."""
    trials = {t.number: t for t in study.get_trials(deepcopy=False)}
    first = root(trials, trial)
    return first - sum(not _is_first(t) for number, t in trials.items() if number < first)


def root(trials: dict[int, FrozenTrial], trial: FrozenTrial) -> int:
    """Number of the trial that first had the work this one does."""
    first = trial
    while not _is_first(first):
        first = trials[first.user_attrs[records.RESUMES]]
    return first.number


def _is_first(trial: FrozenTrial) -> bool:
    return records.RESUMES not in trial.user_attrs


def _grid(study: Study) -> dict[str, list[Any]]:
    """Values by param name."""
    grid: dict[str, list[Any]] = {}
    ranges = []
    for field, param in study.space.items():
        match param:
            case Choice():
                grid[param_name(field, param)] = list(param.values)
            case Multiple():
                grid[param_name(field, param)] = list(param.factors)
            case _:
                ranges.append(f"{field}={param}")
    if ranges:
        raise StudyError(
            f"the study {study.name!r} is a grid, which takes Choice and Multiple alone, but has {'; '.join(ranges)}"
        )
    return grid
