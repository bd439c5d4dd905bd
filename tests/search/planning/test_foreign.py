"""Trials that other programs wrote into the study: the plan learns nothing from them, and goes on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from search import pruning, records
from search.planning.budget import Budget
from search.planning.comparable import Comparable
from search.planning.laddered import Laddered
from search.planning.plan import Plan, is_paused
from search.planning.prior import Prior
from search.planning.rungs import RungPlan
from search.planning.thaw import FreezeThaw
from search.sampling.aimed import Proposes
from search.sampling.make import FREEZE_THAW, make_sampler
from search.sampling.params import distribution, suggest
from search.space import Choice, Float, Int, Multiple, contains, fits, param_name
from search.storage import lifecycle
from search.storage.database import close_storage, open_storage
from search.storage.queue import LongestFirst
from search.storage.studies import open_study
from search.study import Study

STUDY = Study(
    name="shared",
    description="a study that others write into",
    base={"max_samples": 40, "num_epochs": 6, "data": "mini", "model": "mini"},
    space={
        "learning_rate": Float(1e-5, 1e-3, log=True),
        "lora_r": Int(2, 16, log=True),
        "lora_alpha": Multiple("lora_r", (1.0, 2.0)),
        "batch_size": Choice((2, 4)),
    },
    n_trials=30,
)
OURS = {"learning_rate": 2e-4, "lora_r": 8, "lora_alpha_per_lora_r": 2.0, "batch_size": 4}
CONFIG = STUDY.config({}).model_dump(mode="json")
WORDS: Any = CategoricalDistribution(("slow", "fast"))
ANY = FloatDistribution(-1e6, 1e6)
FOREIGN: dict[str, dict[str, Any]] = {
    "a name that the space does not have": {"params": {"speed": 3.0}},
    "as many names as the space, others": {"params": {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}},
    "a negative rate": {"params": {**OURS, "learning_rate": -1.0}},
    "a rate of nothing": {"params": {**OURS, "learning_rate": 0.0}},
    "a word for a number": {"params": {**OURS, "learning_rate": "slow"}},
    "some of the params": {"params": {"lora_r": 8}},
    "no params": {},
    "an empty configuration": {"user_attrs": {records.CONFIG: {}}},
    "a configuration of words": {"user_attrs": {records.CONFIG: dict.fromkeys(CONFIG, "high")}},
    "a configuration of nothing": {"user_attrs": {records.CONFIG: dict.fromkeys(CONFIG)}},
    "a negative rate in its configuration": {"user_attrs": {records.CONFIG: {**CONFIG, "learning_rate": -1.0}}},
    "no samples at all": {"user_attrs": {records.CONFIG: {**CONFIG, "batch_size": 0}}},
    "far outside": {"user_attrs": {records.CONFIG: {**CONFIG, "lora_alpha": 1e200}}},
    "a rate without end": {"user_attrs": {records.CONFIG: {**CONFIG, "learning_rate": math.inf}}},
    "losses by step and not by epoch": {"params": OURS, "intermediate_values": {10**9: 1.2}},
    "overrides of another kind": {"params": OURS, "user_attrs": {records.OVERRIDES: {"num_epochs": "many"}}},
}


def of(what: str, state: TrialState) -> FrozenTrial:
    given = FOREIGN[what]
    losses = {} if state == TrialState.WAITING else given.get("intermediate_values", {1: 1.3, 2: 0.5})
    return made(state, given.get("params", {}), given.get("user_attrs", {}), losses)


def made(
    state: TrialState, params: dict[str, Any], attrs: dict[str, Any], losses: dict[int, float], number: int = -1
) -> FrozenTrial:
    found = create_trial(
        state=state,
        value=min(losses.values(), default=0.5) if state == TrialState.COMPLETE else None,
        params=params,
        distributions={name: _holding(name, value) for name, value in params.items()},
        user_attrs=attrs,
        intermediate_values=losses,
    )
    found.number = number
    return found


def _holding(name: str, value: Any) -> BaseDistribution:
    """A distribution that has the value: the study's own if it does."""
    if fits(STUDY.space)(name, value):
        return {param_name(*item): distribution(item[1]) for item in STUDY.space.items()}[name]
    return WORDS if isinstance(value, str) else ANY


def ours() -> list[FrozenTrial]:
    """Three of the search's own: one has ended, one is paused, one runs."""
    found = []
    states = (TrialState.COMPLETE, TrialState.WAITING, TrialState.RUNNING)
    for number, (state, low, rate) in enumerate(zip(states, (1.30, 1.28, 1.35), (1e-4, 3e-4, 9e-5), strict=True)):
        params = {**OURS, "learning_rate": rate}
        attrs: dict[str, Any] = {records.CONFIG: STUDY.config(params).model_dump(mode="json")}
        if state == TrialState.WAITING:
            attrs[records.REASON] = records.PAUSED
        found.append(made(state, params, attrs, {epoch: low + 0.1 / epoch for epoch in range(1, 4)}, number))
    return found


PLANS: dict[str, tuple[Plan, Proposes]] = {
    "freeze-thaw": ((_thaw := FreezeThaw(STUDY, Prior())), _thaw),
    "rungs": (RungPlan(6, leaders=1, among=Comparable(STUDY).among), Laddered(STUDY, Prior())),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_trial_changes_nothing_that_the_plan_says_of_others(what: str, name: str) -> None:
    plan, proposes = PLANS[name]
    before = ours()
    trials = [*before, *(of(what, state) for state in (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING))]
    for number, trial in enumerate(trials):
        trial.number = number
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for new_left in (True, False):
            assert plan.pause(before, before[2], new_left=False)
            assert plan.pause(trials, before[2], new_left=new_left) == plan.pause(before, before[2], new_left=new_left)
            assert plan.resume(trials, new_left=new_left) == plan.resume(before, new_left=new_left)
        assert plan.wanted(trials) == plan.wanted(before)
        assert plan.give_up(trials, before[1]) == plan.give_up(before, before[1])
        proposed = proposes.propose(trials)
    assert all(contains(param, proposed[param_name(field, param)]) for field, param in STUDY.space.items())


def test_rungs_let_be_what_cannot_be_compared_and_count_a_lost_trial_once() -> None:
    plan = PLANS["rungs"][0]
    others = [made(TrialState.COMPLETE, OURS, {}, {1: 0.1, 2: 0.1, 3: 0.1}, number) for number in range(3, 12)]
    fewer = STUDY.config({"lora_r": 8}, {"max_samples": 20}).model_dump(mode="json")
    theirs = made(TrialState.RUNNING, OURS, {records.CONFIG: fewer}, {1: 2.0, 2: 2.0, 3: 2.0}, 12)
    assert plan.pause([*others, theirs], theirs, new_left=True) is None, "validated on other samples"
    own = made(TrialState.RUNNING, OURS, {}, {1: 0.2, 2: 0.2, 3: 0.2}, 12)
    assert plan.pause([*others, own], own, new_left=True)
    # The second of six is among the best third; that the first was lost and taken up makes it no third of seven.
    worse = [made(TrialState.PRUNED, OURS, {}, {1: 0.9, 2: 0.9, 3: 0.9}, number) for number in range(4, 8)]
    lost = made(TrialState.FAIL, OURS, {}, {1: 0.1, 2: 0.1, 3: 0.1}, 0)
    taken_up = made(TrialState.COMPLETE, OURS, {records.RESUMES: 0}, {1: 0.1, 2: 0.1, 3: 0.1}, 1)
    assert plan.pause([taken_up, *worse, own], own, new_left=True) is None
    assert plan.pause([lost, taken_up, *worse, own], own, new_left=True) is None
    assert plan.wanted([lost, taken_up, own]) == 0, "its leader has ended"


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[LongestFirst]:
    """The study as a worker has it, with those trials of its own."""
    storage = open_storage(f"sqlite:///{tmp_path / 'optuna.db'}")
    name = open_study(storage, STUDY).study_name
    storage.fits = fits(STUDY.space)
    pruner = pruning.pruner_for(FREEZE_THAW, STUDY, prior=Prior(), proposes=True)
    study = LongestFirst(name, storage, make_sampler(STUDY, FREEZE_THAW), pruner, STUDY, 40)
    study.add_trials(ours())
    yield study
    close_storage(storage)


def test_what_waits_of_others_is_taken_and_then_the_search_goes_on(shared: LongestFirst) -> None:
    for state in (TrialState.COMPLETE, TrialState.RUNNING):
        shared.add_trials([of(what, state) for what in FOREIGN])
    shared.add_trials([of(what, TrialState.WAITING) for what in [*FOREIGN][::4]])
    theirs = [t.number for t in shared.get_trials() if t.state == TrialState.WAITING and t.number != 1]
    total = len(shared.trials) + 2
    for number in theirs:
        assert shared.has_next(Budget(total))
        assert shared.ask().number == number
    # What is left: the paused one, and two new configurations.
    taken = set()
    while shared.has_next(Budget(total)):
        trial = shared.ask()
        STUDY.config(suggest(trial, STUDY))
        taken.add(trial.number)
    assert {total - 2, total - 1} <= taken <= {1, total - 2, total - 1}


@pytest.mark.parametrize("plan", [FreezeThaw(STUDY, Prior()), RungPlan(6)], ids=["freeze-thaw", "rungs"])
def test_one_that_calls_itself_paused_without_an_epoch_just_waits(
    shared: LongestFirst, plan: FreezeThaw | RungPlan
) -> None:
    shared.plan = plan
    shared.enqueue_trial({}, user_attrs={records.REASON: records.PAUSED, records.PAUSED_AT: 3})
    queued = shared.get_trials()[-1]
    assert not is_paused(queued)
    assert shared.has_next(Budget(STUDY.n_trials)) and shared.ask().number == queued.number


def test_an_incomplete_repeat_is_none(shared: LongestFirst) -> None:
    """Attributes of a repeat that lack the others, or name no trial before it, are not ours."""
    for attrs in (
        {records.REPEAT_OF: 0},
        {records.REPEAT_OF: 0, records.BLOCK: 0, records.TRAINS_TO: 3},
        {records.REPEAT_OF: 99, records.BLOCK: 1, records.TRAINS_TO: 3},
        {records.BLOCK: 1, records.TRAINS_TO: 10**6},
    ):
        shared.enqueue_trial({}, user_attrs=attrs)
        (read,) = [t for t in lifecycle.read_trials(shared) if t.number == len(shared.trials) - 1]
        assert not {records.REPEAT_OF, records.BLOCK, records.TRAINS_TO} & read.attrs.keys()
