"""A trial's params, from the study's space to Optuna's distributions, and the constraints that a trial can violate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.trial import FrozenTrial

from search import records
from search.space import Choice, Float, Int, Multiple, Param, contains, param_name
from search.study import Study
from trainer.common.errors import nearest, shown

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
    """Ask Optuna for the trial's params: values by Optuna's names, in the order of the space.

    Params that the trial already has (queued, parked, requeued) keep their values.
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


def refusal(trial: FrozenTrial, study: Study, trials: Sequence[FrozenTrial]) -> str | None:
    """Why a trial that waited cannot be run; None for one that can, as all that this program queues.

    Other programs queue trials too (`enqueue_trial`, a dashboard), and Optuna takes whatever they name: a value
    outside of its range would be stored, and then be refused by Optuna itself whenever the trial is copied.

    Args:
        trial: As it waited, its params not yet completed.
        study: The definition.
        trials: All trials of the study.
    """
    # Values: of this space, all of them. What is missing is sampled.
    names = {param_name(field, param): param for field, param in study.space.items()}
    given = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    for name, value in given.items():
        if name not in names:
            known = ", ".join(names) or "none"
            return (
                f"it was queued with {shown(name)}, which is no parameter of the study{nearest(name, names)} ({known})"
            )
        if not contains(names[name], value):
            return f"it was queued with {name}={shown(value)}, outside of the search space: {names[name]}"
    for name, held in trial.distributions.items():
        try:
            check_distribution_compatibility(held, distribution(names[name]))
        except ValueError:
            return f"it was queued with a {name} of another search space: {shown(held)}"
    # Attributes: not those of another trial, whose files and records it would take for its own.
    first = root({t.number: t for t in trials}, trial)
    has_begun = trial.user_attrs.get(records.FOLDER) is not None or records.RUN_ID in trial.user_attrs
    if has_begun and records.place_of(trial.user_attrs, first) is None:
        return "it was queued with the attributes of another trial; queue it with its params alone"
    resumes = trial.user_attrs.get(records.RESUMES)
    if resumes is not None and any(
        t.number < trial.number and t.user_attrs.get(records.RESUMES) == resumes for t in trials
    ):
        return f"it was queued to go on with the work of trial {resumes}, which another trial has taken up"
    return None


def root(trials: Mapping[int, FrozenTrial], trial: FrozenTrial) -> int:
    """Number of the first trial in the chain of those whose work this one continues, as far as they are there."""
    first = trial
    while (before := trials.get(first.user_attrs.get(records.RESUMES, -1))) is not None:
        first = before
    return first.number


def mark_constraints(trial: optuna.Trial, violated: str | None) -> None:
    """Record which constraint a trial violated, if any; to be called once, before the trial is told to Optuna.

    TPE ranks a COMPLETE or PRUNED trial by the sum of its positive constraint values; one without any is feasible. The
    other constraints are set to 0 all the same, so that dashboards show them as met. A FAIL would be invisible to TPE:
    with the optimum beside a cliff of NaN, 45 of 50 trials fell off it when these were told as FAIL, 20 when they were
    told as PRUNED (mean of 8 seeds, tests/search/sampling/test_params.py).

    Raises:
        ValueError: `violated` is not in `CONSTRAINTS`.
    """
    if violated is not None and violated not in CONSTRAINTS:
        raise ValueError(f"constraints are {', '.join(CONSTRAINTS)}, but got {violated=}.")
    for name in CONSTRAINTS:
        trial.set_constraint(name, 1.0 if name == violated else 0.0)
