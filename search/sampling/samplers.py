"""Optuna's samplers, as a study here uses them.

    SeededByTrial   a study that was interrupted samples what an undisturbed one would have
    KnownSpaceTPE   TPE that is given the space, and learns from trials on the study's own samples alone
    Untried         no configuration of a finite space twice, as long as there are others
    GridInOrder     each point of a grid once, in an order that only the seed decides

`search.sampling.make` chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from search import records
from search.errors import StudyError
from search.planning.candidates import begun, key, left
from search.planning.comparable import OwnSamples
from search.sampling.params import distribution, root
from search.space import Choice, Multiple, param_name
from search.storage.optuna_private import FilteredStudy, GridPoints, trial_id
from search.study import Study

N_STARTUP_TRIALS = 5
"""Trials that TPE samples at random before it models anything; Optuna's default is 10.

A study here has a dozen trials: with 10 all but two of them would be random. Measured on a smooth surface with a cliff
over rsicap_mini's space, noise 0.003, 100 seeds of 12 trials: mean best 1.3114 with 3, 1.3120 with 5, 1.3130 with 10,
each +-0.0007. So fewer are not worse, and perhaps better; 5 keep some spread in six dimensions. A constant and not a
share of the budget, so that a study continued with more trials samples what a longer one would have.
"""


REDRAWN = 10
"""Draws by the sampler before one of the configurations that are left is taken: TPE has its reasons, and is heard."""


def base_sampler(study: Study, seed: int) -> BaseSampler:
    """Make a TPE or random sampler, as the study has it, with this seed."""
    if study.sampler == "random":
        return RandomSampler(seed=seed)
    return KnownSpaceTPE(study, seed)


class SeededByTrial(BaseSampler):
    """Delegates each trial to a sampler of its own, seeded by the study's seed and the trial's place.

    A sampler that is seeded once would draw its first samples again after a restart. Here a trial is sampled as if the
    study had never been interrupted: with one worker, the same seed yields the same study however often it is stopped.
    The place is the trial's number, except that trials which take up another's work share the place of the first of
    them and do not count in the places of later ones.

    Args:
        make: Makes the sampler of one trial from a seed.
        seed: The study's seed.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make = make
        self._seed = seed
        self._latest: tuple[int, BaseSampler] | None = None

    def build(self, study: optuna.Study, trial: FrozenTrial, seed: int) -> BaseSampler:
        """Make the sampler of a trial from its seed; overridden where trials differ in more than that."""
        return self._make(seed)

    def _of(self, study: optuna.Study, trial: FrozenTrial) -> BaseSampler:
        if self._latest is None or self._latest[0] != trial_id(trial):
            seed = np.random.SeedSequence((self._seed, place(study, trial))).generate_state(1)[0]
            self._latest = (trial_id(trial), self.build(study, trial, int(seed)))
        return self._latest[1]

    def reseed_rng(self) -> None:
        """Do nothing: seeds belong to trials. Optuna calls this in threads it starts, whose trials differ anyway."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Make the trial's sampler, whether the trial is new or taken up again."""
        self._latest = None
        self._of(study, trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Distributions of the params that are sampled together."""
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
        """Do nothing: TPE and random sampling read what they know from the study."""


class Untried(SeededByTrial):
    """Draws a configuration again that an earlier trial had: its training would come to the same, bit for bit.

    For finite spaces; in a continuous one it does not happen. After `REDRAWN` tries one of those left is drawn. What
    is drawn first is what `SeededByTrial` would have drawn.

    Args:
        make: See `SeededByTrial`.
        study: The definition; its space is finite.
    """

    def __init__(self, make: Callable[[int], BaseSampler], study: Study) -> None:
        super().__init__(make, study.seed)
        self._definition = study
        self._distributions = {param_name(field, param): distribution(param) for field, param in study.space.items()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole space, for a trial that has none of its params yet."""
        if trial.params or trial.system_attrs.get("fixed_params"):
            return super().infer_relative_search_space(study, trial)
        return dict(self._distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Params that no earlier trial has, if there are any."""
        if trial.params or trial.system_attrs.get("fixed_params"):
            return super().sample_relative(study, trial, search_space)
        taken = begun([t for t in study.get_trials(deepcopy=False) if t.number != trial.number])
        first = self._draw(self._of(study, trial), study, trial)
        if key(first) not in taken:
            return first
        seeds = np.random.SeedSequence((self._seed, place(study, trial), 1)).generate_state(REDRAWN + 1)
        for seed in seeds[:-1]:
            drawn = self._draw(self._make(int(seed)), study, trial)
            if key(drawn) not in taken:
                return drawn
        others = left(self._definition.space, taken)
        return others[int(np.random.default_rng(seeds[-1]).integers(len(others)))] if others else first

    def _draw(self, sampler: BaseSampler, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """All params of the space by one sampler."""
        drawn = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
        return {
            name: drawn[name] if name in drawn else sampler.sample_independent(study, trial, name, held)
            for name, held in self._distributions.items()
        }


class KnownSpaceTPE(TPESampler):
    """Optuna's TPE with a known search space: which params are sampled together. From trials given by hand on other
    samples it learns nothing: their losses cannot be compared with those of the others, and the easiest would win.

    Optuna derives it from the distributions of all finished trials. Here it would do so for each trial, since each has
    a sampler of its own, which takes 0.2 s with 10,000 trials (docs/scaling.md). All trials of a study follow its one
    definition, so the answer is the whole space.

    Args:
        study: The study, for its space.
        seed: The trial's seed.
    """

    def __init__(self, study: Study, seed: int) -> None:
        super().__init__(n_startup_trials=N_STARTUP_TRIALS, seed=seed)
        found = {param_name(field, param): distribution(param) for field, param in study.space.items()}
        # Optuna's order: it decides which param each number of the generator is drawn for.
        self._space = {name: found[name] for name in sorted(found) if not found[name].single()}
        self._own_samples = OwnSamples(study)
        self._view: tuple[optuna.Study, optuna.Study] | None = None

    def _of(self, study: optuna.Study) -> optuna.Study:
        if self._view is None or self._view[0] is not study:
            self._view = (study, FilteredStudy(study, self._own_samples))
        return self._view[1]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The study's space. Until `N_STARTUP_TRIALS` have finished, TPE samples its params independently."""
        return dict(self._space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of the params that are sampled together."""
        drawn: dict[str, Any] = super().sample_relative(self._of(study), trial, search_space)
        return drawn

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The value of a param by itself."""
        return super().sample_independent(self._of(study), trial, param_name, param_distribution)


class GridInOrder(GridPoints):
    """Optuna's grid sampler, walking through the shuffled grid by the trials' places.

    Optuna's own takes points by trial number, at random once numbers and points are out of step (trials given by hand,
    requeued ones), and calls `Study.stop`, which only `Study.optimize` allows. Here each point is visited once, in an
    order that only the seed decides, with any number of workers. `total` says when all have been: a trial beyond them
    would train a point again, with the same result.

    Args:
        study: A study whose params are all a Choice or a Multiple.

    Raises:
        StudyError: some of its params are ranges.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(_grid(study), seed=study.seed)
        self._random = SeededByTrial(lambda seed: RandomSampler(seed=seed), study.seed)

    def total(self, study: optuna.Study) -> int:
        """How many trials the study has once each point has had one, those given by hand included."""
        by_hand = sum("fixed_params" in t.system_attrs and _is_first(t) for t in study.get_trials(deepcopy=False))
        return by_hand + self.n_points

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Give a new trial its point of the grid; one given by hand has none."""
        if "grid_id" in trial.system_attrs or "fixed_params" in trial.system_attrs:
            return
        trials = {t.number: t for t in study.get_trials(deepcopy=False)}
        before = [t for number, t in trials.items() if number < root(trials, trial)]
        by_hand = sum("fixed_params" in t.system_attrs and _is_first(t) for t in before)
        self.give(study, trial, (place(study, trial) - by_hand) % self.n_points)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The param's value at the trial's point; a random one where a trial given by hand leaves it open."""
        if "grid_id" not in trial.system_attrs:
            return self._random.sample_independent(study, trial, param_name, param_distribution)
        return super().sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Do nothing: the worker that asks for trials knows when to stop."""


def place(study: optuna.Study, trial: FrozenTrial) -> int:
    """The number that a trial would have if none had been lost or repeated: that of the first trial whose work it
    continues, less the trials before that one that took up another's work. A sampler is shown no repeats."""
    trials = {t.number: t for t in study.get_trials(deepcopy=False)}
    first = root(trials, trial)
    return sum(_is_first(t) for number, t in trials.items() if number < first)


def _is_first(trial: FrozenTrial) -> bool:
    return records.RESUMES not in trial.user_attrs


def _grid(study: Study) -> dict[str, list[Any]]:
    """Values of a grid by param name.

    Raises:
        StudyError: params are ranges; all of them are named.
    """
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
            f"the study {study.name!r} is a grid, so its params must be Choice or Multiple, "
            f"but it has {'; '.join(ranges)}"
        )
    return grid
