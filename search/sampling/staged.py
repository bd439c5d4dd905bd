"""`--strategy staged`: the hand-run log's order of work, "stability first, then convergence, then capacity".

    stability   short probes of the highest learning rates, falling until one is stable; none above it afterwards
    rate        learning rate, warmup, batch size and others, at rank 8, alpha 16 and the base's dropout
    capacity    rank, alpha and dropout, at the best of what `rate` found
    together    everything, near the best

A trial's stage follows from its place, the budget and the trials before it, and is stored with the trial
(`records.STAGE`), so a study that is continued goes on where it was. Stages whose params a study does not search are
left out. A trial given by hand has no stage.

The stages are built from Optuna's own parts: `PartialFixedSampler` for params that a stage fixes, and a narrower
relative search space for those it confines. Trials keep the study's full distributions, so all of them stay comparable
and TPE learns from all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, PartialFixedSampler
from optuna.trial import FrozenTrial, TrialState

from search import records
from search.pruning import best_value
from search.sampling.params import root
from search.sampling.samplers import SeededByTrial, base_sampler
from search.space import Choice, Float, Int, Multiple, Param, param_name
from search.storage.optuna_private import set_user_attr
from search.study import Study

STABILITY, RATE, CAPACITY, TOGETHER = STAGES = ("stability", "rate", "capacity", "together")
"""Values of `records.STAGE`, in their order."""

SHARES = {RATE: 2, CAPACITY: 1, TOGETHER: 1}
"""Shares of the trials after the probes. Varying one param at a time, PLoRA (arXiv 2508.02932) measures swings of 5 to
14 points for the rate and 3 to 11 for the batch size; once the rate is tuned, LoRA variants lie within 1 to 2 %
(2602.04998)."""

PROBE_SHARE = 4
"""At most one trial in this many is a probe."""
MAX_PROBES = 6
FALL = 2.0
"""Each probe's rate is that of the one before divided by this; the hand-run log went from 1e-3 to 5e-4 to 2e-4."""

CAPACITY_FIELDS = ("lora_r", "lora_alpha", "lora_dropout")
START = {"lora_r": 8, "lora_alpha": 16}
"""Capacity while the rate is searched: the log's recommended start."""
WINDOW = 0.25
"""`together` searches this share of a range to either side of the best, on the range's own scale."""


def stage_overrides(trial: optuna.Trial | FrozenTrial) -> dict[str, Any]:
    """Fields that the trial sets outside the search space: a probe's short training, or values given by hand."""
    return dict(trial.user_attrs.get(records.OVERRIDES, {}))


def is_probe(trial: optuna.Trial | FrozenTrial) -> bool:
    """Whether the trial is a probe of stability, which ends as PRUNED with `records.PROBE` unless it is unstable."""
    return trial.user_attrs.get(records.STAGE) == STABILITY


class StagedSampler(SeededByTrial):
    """Samples by stages; see the module.

    Args:
        study: Its space, base, seed and kind of sampler.
        n_trials: Trials in total, those given by hand included. When a study is continued with more trials, the
            additional ones go to the stages still to come, never to an earlier one.
    """

    def __init__(self, study: Study, n_trials: int) -> None:
        super().__init__(lambda seed: base_sampler(study, seed), study.seed)
        self._params = {param_name(field, param): (field, param) for field, param in study.space.items()}
        self._base = study.base_config().model_dump()
        self._budget = n_trials - len(study.enqueue)
        self._max_probes = self._count_probes()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Give a new trial its stage."""
        by_hand = "fixed_params" in trial.system_attrs or records.LABEL in trial.user_attrs
        if records.STAGE not in trial.user_attrs and not by_hand and self._params:
            stage = self._stage(_before(study, trial))
            attrs: dict[str, Any] = {records.STAGE: stage}
            if stage == STABILITY:
                # A probe has one epoch, in which it must reach its rate.
                warmup = {} if "warmup_steps" in self._params else {"warmup_steps": 0}
                attrs[records.OVERRIDES] = {"num_epochs": 1, **warmup}
            for key, value in attrs.items():
                set_user_attr(study, trial, key, value)
                trial.set_user_attr(key, value)  # for `Trial.user_attrs`, which reads this copy
        super().before_trial(study, trial)

    def build(self, study: optuna.Study, trial: FrozenTrial, seed: int) -> BaseSampler:
        """The sampler of this trial's stage."""
        base = super().build(study, trial, seed)
        stage = trial.user_attrs.get(records.STAGE)
        if stage is None:
            return base
        before = _before(study, trial)
        fixed = self._fixed(stage, before)
        ranges = self._ranges(stage, before)
        for name in [name for name, d in ranges.items() if d.single()]:
            fixed.setdefault(name, ranges.pop(name).low)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="PartialFixedSampler", category=ExperimentalWarning)
            return PartialFixedSampler(fixed, Narrowed(base, ranges))

    def _count_probes(self) -> int:
        """The largest number of probes: none for a study without a range of learning rates."""
        _, rate = self._params.get("learning_rate", (None, None))
        if not isinstance(rate, Float) or rate.low <= 0 or rate.low == rate.high:
            return 0
        possible = 1 + int(math.log(rate.high / rate.low, FALL))
        return max(0, min(self._budget // PROBE_SHARE, MAX_PROBES, possible))

    def _stage(self, before: Sequence[FrozenTrial]) -> str:
        """The stage of the trial after these."""
        staged = [t for t in before if records.STAGE in t.user_attrs and records.RESUMES not in t.user_attrs]
        probes = [t for t in staged if is_probe(t)]
        done = len(staged) - len(probes)
        settled = any(_is_stable(t) for t in before if is_probe(t))
        if done == 0 and not settled and len(probes) < self._max_probes:
            return STABILITY
        capacity = {field in CAPACITY_FIELDS for field, _ in self._params.values()}
        shares = {s: SHARES[s] for s in (RATE, CAPACITY, TOGETHER) if s == TOGETHER or (s == CAPACITY) in capacity}
        budget = max(1, self._budget - len(probes))
        stage, ends = TOGETHER, 0.0
        for name, share in shares.items():
            ends += budget * share / sum(shares.values())
            if done < math.ceil(ends):
                stage = name
                break
        reached: list[str] = [t.user_attrs[records.STAGE] for t in staged]
        return max([stage, *reached], key=STAGES.index)

    def _fixed(self, stage: str, before: Sequence[FrozenTrial]) -> dict[str, Any]:
        """Values of the params that the stage holds fixed, by name."""
        start = {name: self._start(field, param) for name, (field, param) in self._params.items()}
        if stage == STABILITY:
            probes = sum(is_probe(t) and records.RESUMES not in t.user_attrs for t in before)
            fixed = {**start, "learning_rate": self._probe_rate(probes)}
            _, warmup = self._params.get("warmup_steps", (None, None))
            if isinstance(warmup, Int | Float):
                fixed["warmup_steps"] = warmup.low
            return fixed
        if stage == RATE:
            return {name: start[name] for name, (field, _) in self._params.items() if field in CAPACITY_FIELDS}
        if stage == CAPACITY:
            best = self._best(before)
            values = best.params if best else self._capped(start, before)
            return {name: values[name] for name, (field, _) in self._params.items() if field not in CAPACITY_FIELDS}
        return {}

    def _ranges(self, stage: str, before: Sequence[FrozenTrial]) -> dict[str, FloatDistribution | IntDistribution]:
        """Distributions of the params that the stage confines, by name: near the best, and below unstable rates."""
        best = self._best(before) if stage == TOGETHER else None
        cap = self._cap(before)
        ranges: dict[str, FloatDistribution | IntDistribution] = {}
        for name, (_, param) in self._params.items():
            if not isinstance(param, Float | Int):
                continue
            low, high = _window(param, best.params[name]) if best else (param.low, param.high)
            if name == "learning_rate" and cap is not None:
                high = max(param.low, min(high, cap))
                low = min(low, high)
            if (low, high) == (param.low, param.high):
                continue
            if isinstance(param, Int):
                ranges[name] = IntDistribution(int(low), int(high), log=param.log)
            else:
                ranges[name] = FloatDistribution(low, high, log=param.log)
        return ranges

    def _probe_rate(self, index: int) -> float:
        _, rate = self._params["learning_rate"]
        assert isinstance(rate, Float)
        return max(rate.low, rate.high / FALL**index)

    def _cap(self, before: Sequence[FrozenTrial]) -> float | None:
        """The highest rate that may be sampled: the highest stable probe's, else one below all unstable probes."""
        probes = [t for t in before if is_probe(t)]
        stable = [t.params["learning_rate"] for t in probes if _is_stable(t)]
        unstable = [t.params["learning_rate"] for t in probes if _is_unstable(t)]
        if stable:
            return float(max(stable))
        return float(min(unstable)) / FALL if unstable else None

    def _capped(self, values: dict[str, Any], before: Sequence[FrozenTrial]) -> dict[str, Any]:
        cap = self._cap(before)
        if cap is None or "learning_rate" not in values:
            return values
        _, rate = self._params["learning_rate"]
        lowest = rate.low if isinstance(rate, Float) else cap
        return {**values, "learning_rate": max(lowest, min(values["learning_rate"], cap))}

    def _best(self, before: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """The best finished trial without overrides; probes and trials that violated a constraint are left out."""
        candidates = []
        for trial in before:
            finished = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
            plain = not trial.user_attrs.get(records.OVERRIDES) and not any(v > 0 for v in trial.constraints.values())
            value = best_value(trial)
            if finished and plain and value is not None and self._params.keys() <= trial.params.keys():
                candidates.append((value, trial.number, trial))
        return min(candidates)[2] if candidates else None

    def _start(self, field: str, param: Param) -> Any:
        """A param's value before it is searched: the log's start, else the base's, moved into its range."""
        values = {**self._base, **{name: value for name, value in START.items() if name == field}}
        match param:
            case Float():
                return min(max(values[field], param.low), param.high)
            case Int():
                return int(min(max(values[field], param.low), param.high))
            case Choice():
                return _nearest(values[field], param.values)
            case Multiple(of=of, factors=factors):
                whole = START.get(of, values[of])
                return _nearest(values[field] / whole, factors) if whole else factors[0]


class Narrowed(BaseSampler):
    """Confines another sampler to narrower ranges of some params.

    Args:
        base: The sampler that samples.
        ranges: Distributions by param name, each within the study's and on the same scale.
    """

    def __init__(self, base: BaseSampler, ranges: dict[str, FloatDistribution | IntDistribution]) -> None:
        self._base = base
        self._ranges = ranges

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The base's search space with the narrower ranges."""
        space = self._base.infer_relative_search_space(study, trial)
        return {name: self._ranges.get(name, full) for name, full in space.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values within the narrower ranges."""
        return self._base.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value within the narrower range."""
        narrower = self._ranges.get(param_name, param_distribution)
        return self._base.sample_independent(study, trial, param_name, narrower)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Begin a trial."""
        self._base.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """End a trial."""
        self._base.after_trial(study, trial, state, values)


def _before(study: optuna.Study, trial: FrozenTrial) -> list[FrozenTrial]:
    """The trials created before this one, or before the first of those whose work it continues."""
    trials = {t.number: t for t in study.get_trials(deepcopy=False)}
    first = root(trials, trial)
    return [t for number, t in sorted(trials.items()) if number < first]


def _is_unstable(probe: FrozenTrial) -> bool:
    signs = (records.NON_FINITE, records.DIVERGED)
    return probe.constraints.get(records.NON_FINITE, 0) > 0 or probe.user_attrs.get(records.REASON) in signs


def _is_stable(probe: FrozenTrial) -> bool:
    """Whether a probe finished without instability. One that ran out of memory says nothing about its rate."""
    finished = probe.state in (TrialState.COMPLETE, TrialState.PRUNED)
    violated = any(value > 0 for value in probe.constraints.values())
    return finished and not violated and not _is_unstable(probe) and best_value(probe) is not None


def _window(param: Float | Int, best: float) -> tuple[float, float]:
    """The part of the range near the best."""
    if param.log:
        reach = (param.high / param.low) ** WINDOW
        low, high = best / reach, best * reach
    else:
        reach = (param.high - param.low) * WINDOW
        low, high = best - reach, best + reach
    if isinstance(param, Int):
        low, high = math.ceil(low), math.floor(high)
    return max(param.low, min(low, best)), min(param.high, max(high, best))


def _nearest(value: Any, values: Sequence[Any]) -> Any:
    """The value itself if it is one of these, else the nearest number, else the first."""
    numbers = [v for v in values if isinstance(v, int | float)]
    if value in values or not numbers or not isinstance(value, int | float):
        return value if value in values else values[0]
    return min(numbers, key=lambda v: abs(v - value))
