"""A trial's params, from the study's space to Optuna's distributions, and the constraints that a trial can violate."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from search import records
from search.space import Choice, Float, Int, Multiple, Param, param_name
from search.study import Study

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
