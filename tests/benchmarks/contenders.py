"""The strategies that are compared: the product's by its own objects, Optuna's by theirs, and published ones in small.

Those that pause trials (`ASHA`, the naive combination, one-epoch screening) do it as the product can: the judge's
outcome is WAITING, and the study's `in_order` chooses which waiting trial goes on.

NePS and ifBO are not among them: ifbo 0.4.1 fetches the weights of its surrogate from figshare at first use
(`ifbo/download.py`), and neural-pipeline-search offers ifBO through it, so neither runs without a download.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from search.planning.budget import Budget
from search.planning.prior import Prior
from search.planning.thaw import FreezeThaw
from search.pruning import default_pruner, plan_of, pruner_for, settled
from search.records import Outcome
from search.sampling.make import FREEZE_THAW, default_strategy, make_sampler
from search.sampling.params import distribution
from search.space import param_name
from search.storage.optuna_private import OrderedStudy, latest
from search.storage.queue import LongestFirst
from search.study import Study
from tests.benchmarks.replaying import Judge, Memory, Play, Winner, tell

RUNGS = (1, 3, 9)
ONE_OF = 3
"""One trial in this many goes on from a rung."""
PRIOR = (-2.65, 0.4)
"""log10 of the effective rate of the best real runs, and how far around it the naive combination draws (decades)."""
SCREENED, TAKEN = 32, 4
"""One-epoch screening: of so many trials of one epoch, so many are trained to the end; then once more."""
SOUND = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "batch_size": 4, "warmup_steps": 5}
"""All that a ladder of effective rates does not vary."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a strategy is told."""

    definition: Study
    slots: int = 8
    budget: int
    seed: int = 0
    trials: int | None = None
    """Configurations of a study of the product's; by default as with `--epochs`, those that come of the budget."""


@dataclass(frozen=True)
class Strategy:
    """A line of the comparison."""

    name: str
    about: str
    make: Callable[[Setting], Play]
    most_seeds: int | None = None
    """Fewer seeds than asked for, where a study takes a minute."""


# Parts.


def optunas(setting: Setting, sampler: BaseSampler, pruner: BasePruner) -> Play:
    """A study of Optuna's, as it comes."""
    storage = Memory()
    # Hyperband takes a trial's bracket from the study's name, which would otherwise be another at each run.
    study = optuna.create_study(storage=storage, sampler=sampler, pruner=pruner, study_name=f"study-{setting.seed}")
    return Play(study=study)


def products(
    setting: Setting,
    sampler: str = "tpe",
    pruner: str = "rising",
    strategy: str = "joint",
    prior: Prior | None = None,
) -> Play:
    """A study as a worker of the product opens it."""
    definition = _with(setting, sampler)
    # Freeze-thaw has no use for more than so many, and its model of them all would take minutes.
    most = (
        max(40, setting.budget // definition.base_config().num_epochs) if FREEZE_THAW in (strategy, pruner) else None
    )
    trials = setting.trials or most or setting.budget
    proposes = strategy == FREEZE_THAW
    total = Budget(trials, None if setting.trials else setting.budget)
    made = (
        make_sampler(definition, strategy, prior),
        pruner_for(pruner, definition, total, prior=prior, proposes=proposes),
    )
    study = LongestFirst(*_stored(setting.seed), *made, definition, definition.base_config().max_samples or 0)
    study.longest_first = setting.slots > 1

    def ask() -> optuna.Trial | None:
        while study.has_next(total):
            trial = study.ask()
            if study.given_up is None:
                return trial
            tell(study, trial, settled(study, latest(trial), study.given_up))
        return None

    return Play(study=study, ask=ask if study.plan is not None else None)


def by_curves(setting: Setting) -> Play:
    """Freeze-thaw, its best so far named by its model of all curves and not by the luckiest epoch."""
    play = freeze_thaw()(setting)
    plan = plan_of(play.study.pruner)
    assert isinstance(plan, FreezeThaw)

    def named(study: optuna.Study) -> Winner | None:
        outlook = plan.outlook(study.get_trials(deepcopy=False))
        return None if outlook.empty else outlook.named()

    return replace(play, named=named)


def _with(setting: Setting, sampler: str) -> Study:
    return replace(setting.definition, sampler=sampler, seed=setting.seed)  # type: ignore[arg-type]


def _stored(seed: int = 0) -> tuple[str, Memory]:
    storage = Memory()
    return optuna.create_study(storage=storage, study_name=f"study-{seed}").study_name, storage


class Rungs(OrderedStudy):
    """ASHA's promotion type (Li et al. 2020, algorithm 2): trials pause at rungs, and one among the best third of its
    rung goes on before a new one begins.

    Args:
        sampler: Of new trials.
        rungs: Epochs at which trials pause.
    """

    def __init__(self, sampler: BaseSampler, rungs: Sequence[int] = RUNGS) -> None:
        super().__init__(*_stored(), sampler, NopPruner())
        self._rungs = tuple(rungs)

    def in_order(self, waiting: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        """The trial to be promoted, from the highest rung that has one, else those that have not begun; none lets
        `ask` begin a new one."""
        trials = self.get_trials(deepcopy=False)
        for rung in reversed(self._rungs):
            field = sorted(t.intermediate_values[rung] for t in trials if rung in t.intermediate_values)
            best = field[: len(field) // ONE_OF]
            here = [t for t in waiting if max(t.intermediate_values, default=0) == rung]
            good = [t for t in here if best and t.intermediate_values[rung] <= best[-1]]
            if good:
                return [min(good, key=lambda t: t.intermediate_values[rung])]
        return [t for t in waiting if not t.intermediate_values]


class Screening(OrderedStudy):
    """One-epoch screening (arXiv 2307.15422): trials are ranked by their first epoch, the best few are trained on."""

    def __init__(self, sampler: BaseSampler) -> None:
        super().__init__(*_stored(), sampler, NopPruner())
        self._taken = 0

    def in_order(self, waiting: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        """One of the best of the latest so many, once they all have begun."""
        begun = len(self.get_trials(deepcopy=False))
        cycle = self._taken // TAKEN
        latest = [t for t in waiting if t.number >= SCREENED * cycle]
        if begun < SCREENED * (cycle + 1) or not latest:
            return []
        self._taken += 1
        return [min(latest, key=lambda t: t.intermediate_values[1])]


def pausing(rungs: Sequence[int]) -> Judge:
    """The judge that sets trials back to waiting at these epochs."""

    def judge(study: optuna.Study, trial: FrozenTrial) -> Outcome | None:
        epoch = max(trial.intermediate_values)
        return Outcome(state="WAITING", reason="paused", detail=f"at epoch {epoch}") if epoch in rungs else None

    return judge


class Drawn(BaseSampler):
    """Draws whole configurations by a function of a generator and the trial's number."""

    def __init__(self, definition: Study, seed: int, values: Callable[[np.random.Generator, int], dict[str, Any]]):
        self._space = {param_name(f, p): distribution(p) for f, p in definition.space.items()}
        self._rates = definition.space["learning_rate"]
        self._seed = seed
        self._values = values

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All params at once."""
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The params of the values; the rate that gives their effective rate, as near as its range allows."""
        values = self._values(np.random.default_rng([self._seed, trial.number]), trial.number)
        rate = 10 ** values.pop("z") * math.sqrt(values["batch_size"]) / values["lora_alpha"]
        low, high = self._rates.low, self._rates.high  # type: ignore[union-attr]
        values["lora_alpha_per_lora_r"] = values.pop("lora_alpha") // values["lora_r"]
        return {**values, "learning_rate": min(max(rate, low), high)}

    def sample_independent(self, *args: Any) -> Any:
        """Nothing is left to sample."""
        raise AssertionError(args)


def around_prior(setting: Setting) -> Drawn:
    """Effective rates around the prior, all else at random."""
    space = setting.definition.space

    def values(rng: np.random.Generator, _: int) -> dict[str, Any]:
        rank = int(np.exp(rng.uniform(np.log(4), np.log(33))))
        return {
            "z": rng.normal(*PRIOR),
            "lora_r": rank,
            "lora_alpha": rank * int(rng.choice((1, 2, 4))),
            "lora_dropout": rng.uniform(0, 0.2),
            "batch_size": int(np.exp(rng.uniform(np.log(2), np.log(17)))),
            "warmup_steps": int(rng.integers(0, space["warmup_steps"].high + 1)),  # type: ignore[union-attr]
        }

    return Drawn(setting.definition, setting.seed, values)


def ladder(setting: Setting) -> Drawn:
    """Effective rates within a decade of the prior, ever closer together (van der Corput), all else fixed."""
    shift = np.random.default_rng(setting.seed).uniform()

    def values(_: np.random.Generator, number: int) -> dict[str, Any]:
        place, step, left = shift, 0.5, number
        while left:
            place, step, left = place + step * (left % 2), step / 2, left // 2
        return {**SOUND, "z": PRIOR[0] - 1 + 2 * (place % 1)}

    return Drawn(setting.definition, setting.seed, values)


def _gp(setting: Setting) -> Play:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optunas(setting, GPSampler(seed=setting.seed), MedianPruner())


def ours(setting: Setting, prior: Prior | None = None) -> Play:
    """The product's default, whatever it is; with another prior of the effective rate than its own."""
    strategy = default_strategy(setting.definition)
    return products(setting, pruner=default_pruner(strategy), strategy=strategy, prior=prior)


def off(decades: float) -> Callable[[Setting], Play]:
    """The product's default with a prior that is wrong by so much."""
    return lambda setting: ours(setting, Prior(centre=Prior().centre + decades))


def freeze_thaw(decades: float = 0.0) -> Callable[[Setting], Play]:
    """`--strategy freeze-thaw`, its prior wrong by so much."""
    prior = Prior(centre=Prior().centre + decades)
    return lambda setting: products(setting, strategy=FREEZE_THAW, pruner=FREEZE_THAW, prior=prior)


STRATEGIES = {
    each.name: each
    for each in (
        Strategy("random", "random, all in full", lambda s: products(s, "random", "none")),
        Strategy("random+rising", "random, rising rule", lambda s: products(s, "random", "rising")),
        Strategy(
            "optuna",
            "Optuna's defaults: TPE + median rule",
            lambda s: optunas(s, TPESampler(seed=s.seed), MedianPruner()),
        ),
        Strategy(
            "hyperband",
            "TPE + Hyperband",
            lambda s: optunas(
                s,
                TPESampler(seed=s.seed),
                HyperbandPruner(min_resource=1, max_resource=s.definition.base_config().num_epochs),
            ),
        ),
        Strategy("gp", "GP sampler + median rule", _gp, most_seeds=10),
        Strategy(
            "asha",
            "ASHA, promotion type, random",
            lambda s: Play(study=Rungs(RandomSampler(seed=s.seed)), judge=pausing(RUNGS)),
        ),
        Strategy(
            "screening",
            f"one-epoch screening, {TAKEN} of {SCREENED} in full",
            lambda s: Play(study=Screening(RandomSampler(seed=s.seed)), judge=pausing((1,))),
        ),
        Strategy(
            "ladder",
            "a ladder of effective rates alone, in full",
            lambda s: optunas(s, ladder(s), NopPruner()),
        ),
        Strategy(
            "naive",
            "drawn around the prior, pausing at 1, 3, 9",
            lambda s: Play(study=Rungs(around_prior(s)), judge=pausing(RUNGS)),
        ),
        Strategy("today", "TPE with 5 random trials, rising rule", products),
        Strategy(
            "aimed+rungs",
            "our proposals, pausing at 1, 3, 9",
            lambda s: products(s, strategy=FREEZE_THAW, pruner="rungs"),
        ),
        Strategy("freeze-thaw", "--strategy freeze-thaw: what is most worth an epoch", freeze_thaw()),
        Strategy("freeze-thaw by curves", "the same, its best so far named by the curves", by_curves),
        Strategy("freeze-thaw prior low", "freeze-thaw, its prior half a decade too low", freeze_thaw(-0.5)),
        Strategy("freeze-thaw prior high", "freeze-thaw, its prior half a decade too high", freeze_thaw(0.5)),
        Strategy("ours", "the product's default: ladder and variants, the best third goes on", ours),
        Strategy("ours prior low", "ours, its prior half a decade too low", off(-0.5)),
        Strategy("ours prior high", "ours, its prior half a decade too high", off(0.5)),
    )
}
"""By name; the first of the comparison first."""
