"""A study run trial by trial as a worker runs it, with a formula for the training."""

import math

import optuna
from optuna.trial import TrialState

from search import records
from search.sampling.make import make_sampler
from search.sampling.params import mark_constraints, suggest
from search.space import Choice, Multiple
from search.storage.studies import open_study
from search.study import Study
from studies.rsicap_mini import STUDY as MINI

RATE_HIGH = MINI.space["learning_rate"].high
GRID = Study(
    name="grid",
    description="",
    space={
        "lora_r": Choice((4, 8, 16)),
        "lora_alpha": Multiple("lora_r", (1, 2)),
        "lora_dropout": Choice((0.0, 0.1)),
    },
    sampler="grid",
    n_trials=12,
)


def loss_of(params):
    """A smooth stand-in for a training run; the optimum lies inside the ranges."""
    value = 1.3
    if "learning_rate" in params:
        value += 0.1 * (math.log10(params["learning_rate"]) + 3.7) ** 2
    if "lora_r" in params:
        value += 0.004 * (math.log2(params["lora_r"]) - 4) ** 2
    value += 0.2 * (params.get("lora_dropout", 0.1) - 0.05) ** 2
    return value + 1e-4 * params.get("warmup_steps", 0) + 1e-3 * params.get("batch_size", 0)


def run_trial(optuna_study, study, unstable_above=math.inf):
    """One trial as the worker runs it: ask, suggest, train, tell."""
    trial = optuna_study.ask()
    params = suggest(trial, study)
    violated = records.NON_FINITE if params.get("learning_rate", 0) > unstable_above else None
    mark_constraints(trial, violated)
    if violated:
        trial.set_user_attr(records.REASON, violated)
        optuna_study.tell(trial, state=TrialState.PRUNED)
        return trial
    value = loss_of(params)
    trial.report(value, step=1)
    optuna_study.tell(trial, value)
    return trial


def in_memory(study, strategy="joint"):
    return optuna.create_study(sampler=make_sampler(study, strategy))


def params_of(optuna_study):
    """Params of the finished trials in the order in which they ran."""
    done = [t for t in optuna_study.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    return [t.params for t in done]


def restarted(storage, study, strategy):
    """The study as a new process sees it."""
    return open_study(storage, study, sampler=make_sampler(study, strategy))
