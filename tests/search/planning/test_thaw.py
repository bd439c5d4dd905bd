"""`FreezeThaw`: what pauses, what goes on, what begins, and what a decision costs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from search import records
from search.planning import thaw, worth
from search.planning.prior import Prior
from search.planning.thaw import FreezeThaw
from search.sampling.params import distribution
from search.space import Float, Int, Multiple, contains, param_name
from search.study import Study

STUDY = Study(
    name="thaw",
    description="made-up trials",
    base={"max_samples": 40, "num_epochs": 10, "data": "mini", "model": "mini"},
    space={
        "learning_rate": Float(1e-5, 1e-3, log=True),
        "lora_r": Int(2, 16, log=True),
        "lora_alpha": Multiple("lora_r", (1.0, 2.0)),
    },
    n_trials=30,
)


def trial(
    number: int, state: TrialState, losses: list[float], rate: float = 2e-4, reason: str | None = None, **changed: Any
) -> FrozenTrial:
    """One trial as Optuna has it; `changed` are overrides of its configuration."""
    params = {"learning_rate": rate, "lora_r": 8, "lora_alpha_per_lora_r": 2.0}
    attrs: dict[str, Any] = {records.CONFIG: STUDY.config(params, changed).model_dump(mode="json")}
    if changed:
        attrs[records.OVERRIDES] = changed
    if reason is not None:
        attrs[records.REASON] = reason
    made = create_trial(
        state=state,
        value=min(losses) if state == TrialState.COMPLETE else None,
        params=params,
        distributions={param_name(*item): distribution(item[1]) for item in STUDY.space.items()},
        user_attrs=attrs,
        intermediate_values=dict(enumerate(losses, 1)),
    )
    made.number = number
    return made


def falling(last: int, floor: float = 1.0, step: float = 0.06) -> list[float]:
    return [floor * math.exp(-step * math.log(epoch)) for epoch in range(1, last + 1)]


def paused(number: int, losses: list[float], rate: float = 2e-4) -> FrozenTrial:
    return trial(number, TrialState.WAITING, losses, rate, records.PAUSED)


def test_the_best_that_still_falls_goes_on_and_what_has_nothing_to_gain_does_not() -> None:
    done = [trial(i, TrialState.COMPLETE, falling(10, 1.05), rate) for i, rate in enumerate((1e-4, 3e-4, 4e-4))]
    good, bad = paused(3, falling(4), 2e-4), paused(4, falling(4, 1.4), 1e-5)
    plan = FreezeThaw(STUDY, Prior())
    assert plan.resume([*done, good, bad], new_left=False) == 3
    assert plan.resume([*done, bad], new_left=False) is None
    # Running, the one is left alone and the other pauses.
    for waits, pauses in ((good, False), (bad, True)):
        waits.state = TrialState.RUNNING
        assert (plan.pause([*done, waits], waits, new_left=False) is not None) is pauses


@pytest.mark.parametrize(("times", "pauses"), [(3.0, False), (5.0, True)])
def test_a_trial_pauses_for_what_is_worth_several_times_as_much(
    monkeypatch: pytest.MonkeyPatch, times: float, pauses: bool
) -> None:
    """Not for a little more: a curve's late gain is small and sure, what a new configuration promises is neither."""
    done = [trial(i, TrialState.COMPLETE, falling(10, 1.05), rate) for i, rate in enumerate((1e-4, 3e-4, 4e-4))]
    running = trial(3, TrialState.RUNNING, falling(4), 2e-4)
    plan = FreezeThaw(STUDY, Prior())
    own = plan._known(running)
    assert own is not None
    (mine,) = plan.outlook([*done, running]).of([own])
    monkeypatch.setattr(plan, "_of_new", lambda outlook, trials: ({}, times * mine.per_epoch))
    assert (plan.pause([*done, running], running, new_left=True) is not None) is pauses


@pytest.mark.parametrize("changed", [{"max_samples": 400}, {"data": "/other"}], ids=str)
def test_a_trial_on_other_samples_says_nothing_of_what_can_be_reached(changed: dict[str, Any]) -> None:
    """Its losses are of another validation split: with ten times the samples they are lower for everyone."""
    ours = [trial(i, TrialState.COMPLETE, falling(6, 1.05), rate) for i, rate in enumerate((1e-4, 3e-4, 4e-4))]
    ours.append(paused(3, falling(4)))
    running = trial(4, TrialState.RUNNING, falling(3), 2.5e-4)
    other = trial(5, TrialState.COMPLETE, falling(10, 0.5), **changed)
    plan = FreezeThaw(STUDY, Prior())
    assert plan.resume([*ours, other], new_left=False) == plan.resume(ours, new_left=False) == 3
    assert plan.may_gain([*ours, running, other], running)
    assert plan.pause([*ours[:3], running, other], running, new_left=False) is None
    # It is trained to its end itself: there is nothing to compare it with.
    other.state = TrialState.RUNNING
    assert plan.pause([*ours, other], other, new_left=True) is None


def test_trials_that_only_wait_show_no_other_hopeless() -> None:
    queued = [trial(i, TrialState.WAITING, [], rate) for i, rate in enumerate((1e-4, 3e-4, 4e-4))]
    flat = trial(3, TrialState.RUNNING, [1.0] * 9)
    assert FreezeThaw(STUDY, Prior()).pause([*queued, flat], flat, new_left=False) is None


def test_epochs_may_be_searched_or_given_and_fields_without_a_number_too() -> None:
    space = {**STUDY.space, "num_epochs": Int(4, 12), "micro_batch_size": Int(1, 1)}
    study = replace(STUDY, space=space, base={"max_samples": 40, "data": "mini", "model": "mini"})
    plan = FreezeThaw(study, Prior())
    given = [trial(i, TrialState.COMPLETE, falling(n, 1.15), num_epochs=n) for i, n in enumerate((2, 5, 60))]
    proposed = plan.propose([*given, paused(3, falling(3))])
    assert all(contains(param, proposed[param_name(field, param)]) for field, param in space.items())
    assert plan.resume([*given, paused(3, falling(3))], new_left=False) == 3


def test_what_is_asked_after_one_epoch_takes_one_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that pauses, the one that goes on and the configuration that begins are judged by the same curves."""
    fits = []

    class Counted(worth.Outlook):
        def __init__(self, *args: Any) -> None:
            fits.append(args)
            super().__init__(*args)

    monkeypatch.setattr(thaw, "Outlook", Counted)
    plan = FreezeThaw(STUDY, Prior())
    trials = [paused(i, falling(4, 1.0 + i / 50), 1e-4 * (i + 1)) for i in range(4)]
    trials[1].state = TrialState.RUNNING
    plan.may_gain(trials, trials[1])
    plan.pause(trials, trials[1], new_left=True)
    trials[1].state = TrialState.WAITING
    plan.resume(trials, new_left=True)
    plan.propose(trials)
    plan.propose([*trials, trial(4, TrialState.RUNNING, [])])
    plan.give_up(trials, trials[2])
    assert len(fits) == 1
    trials[1].intermediate_values[5] = 0.9
    plan.resume(trials, new_left=True)
    assert len(fits) == 2


def test_many_trials_give_the_model_no_more_points_than_it_can_decide_on() -> None:
    rng = np.random.default_rng(0)
    lasted = rng.integers(1, 30, 500)
    known = [worth.Known(i, -2.5, (), tuple(falling(n, 1.0 + i / 500)), 30) for i, n in enumerate(map(int, lasted))]
    epochs = worth._observed(known)
    assert sum(map(len, epochs)) <= 500 + worth.IN_FULL * (worth.KEPT_EPOCHS - 1)
    assert all(each[-1] == len(k.losses) for each, k in zip(epochs, known, strict=True))
    best = min(known, key=lambda k: min(k.losses))
    assert epochs[best.number] == worth._thinned(len(best.losses))
    few = known[:40]
    assert worth._observed(few) == [worth._thinned(len(k.losses)) for k in few]
