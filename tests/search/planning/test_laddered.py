"""`--strategy rungs`: what begins, and who goes on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from search import records
from search.planning.budget import Budget
from search.planning.candidates import Candidates
from search.planning.coordinates import effective_rate, model_rate
from search.planning.laddered import Laddered, van_der_corput
from search.planning.prior import Prior
from search.planning.rungs import LEADERS, RungPlan
from search.pruning import default_pruner, plan_of, pruner_for
from search.pruning.choice import rung_plan
from search.pruning.pruners import PausingPruner
from search.sampling.aimed import AimedSampler
from search.sampling.make import FREEZE_THAW, RUNGS, make_sampler
from search.sampling.params import distribution
from search.space import Choice, Float, Int, contains, param_name
from search.study import Study
from studies.rsicap import STUDY as RSICAP
from studies.rsicap_mini import STUDY as MINI

PRIOR = Prior(centre=-2.6, width=0.5)


def trial(study: Study, params: dict[str, Any], losses: tuple[float, ...], **attrs: Any) -> FrozenTrial:
    return create_trial(
        state=TrialState.PRUNED,
        params=params,
        distributions={param_name(f, p): distribution(p) for f, p in study.space.items()},
        intermediate_values=dict(enumerate(losses, 1)),
        user_attrs=attrs,
    )


def proposed(study: Study, number: int, prior: Prior = PRIOR) -> tuple[list[dict[str, Any]], list[FrozenTrial]]:
    """So many proposals, each of which ends with the loss of its distance from a rate of 10^-2.4."""
    plan, params, trials = Laddered(study, prior), [], []
    for _ in range(number):
        found = plan.propose(trials)
        z = effective_rate(study.config(found).model_dump())
        params.append(found)
        trials.append(trial(study, found, (1 + abs(z + 2.4),)))
    return params, trials


def test_every_other_is_a_rung_of_the_ladder() -> None:
    """Over a decade to either side of the prior, all else as the hand-run log begins; evenly, whatever the seed."""
    wide = replace(RSICAP, space={**RSICAP.space, "learning_rate": Float(1e-7, 1e-1, log=True)})
    params, _ = proposed(wide, 32)
    ladder = [wide.config(each) for each in params[::2]]
    assert {(c.lora_r, c.lora_alpha, c.batch_size, c.lora_dropout, c.warmup_steps) for c in ladder} == {
        (8, 16, 4, 0.1, 100)
    }
    z = sorted(effective_rate(c.model_dump()) for c in ladder)
    assert z[0] >= -3.6 and z[-1] <= -1.6
    assert np.diff(z) == pytest.approx(2 / 16, abs=1e-6)


def test_where_the_range_of_rates_ends_alpha_goes_on_then_the_batch() -> None:
    """rsicap's highest rate is half a decade above the prior; as little is changed as it takes."""
    candidates = Candidates(RSICAP.space, RSICAP.base_config().model_dump(mode="json"))
    seen = {}
    for z in (-2.6, -2.11, -2.0, -1.72, -1.66, -1.0):
        config = RSICAP.config(candidates.sound_at(np.random.default_rng(0), z))
        seen[z] = (config.lora_alpha, config.batch_size)
        reached = model_rate(config.model_dump())
        assert reached == pytest.approx(z, abs=1e-6) or (z == -1.0 and config.learning_rate == 1e-3)
    assert seen == {-2.6: (16, 4), -2.11: (16, 4), -2.0: (32, 4), -1.72: (32, 3), -1.66: (32, 2), -1.0: (32, 2)}


def test_where_the_range_of_rates_begins_alpha_goes_on_then_the_batch() -> None:
    narrow = replace(RSICAP, space={**RSICAP.space, "learning_rate": Float(2e-4, 1e-3, log=True)})
    candidates = Candidates(narrow.space, narrow.base_config().model_dump(mode="json"))
    config = narrow.config(candidates.sound_at(np.random.default_rng(0), -3.4))
    assert (config.learning_rate, config.lora_alpha) == (pytest.approx(2e-4, rel=0.15), 8)
    assert config.batch_size > 4
    assert model_rate(config.model_dump()) == pytest.approx(-3.4, abs=1e-6)


def test_a_rung_that_nothing_reaches_begins_once() -> None:
    """All of those would be the range's end; the others vary the best instead."""
    fixed = replace(RSICAP, space={"learning_rate": RSICAP.space["learning_rate"], "lora_dropout": Float(0.0, 0.2)})
    params, _ = proposed(fixed, 32)
    ends = [each for each in params if each["learning_rate"] == fixed.space["learning_rate"].high]
    assert len({tuple(sorted(each.items())) for each in params}) == 32
    assert sum(each["lora_dropout"] == 0.1 for each in ends) <= 2


def test_a_warmup_from_a_study_of_another_size_is_short() -> None:
    """The base's 100 steps lie beyond this range, whose end would be a third of a short trial."""
    params, _ = proposed(MINI, 3)
    assert MINI.config(params[0]).warmup_steps == 2


def test_the_others_vary_the_best() -> None:
    params, trials = proposed(RSICAP, 40)
    best = sorted(min(t.intermediate_values.values()) for t in trials)[:3]
    assert max(best) < 1.1
    late = [effective_rate(RSICAP.config(each).model_dump()) for each in params[21::2]]
    assert np.mean(np.abs(np.array(late) + 2.4)) < 0.35
    assert len({RSICAP.config(each).lora_r for each in params[21::2]}) > 2


def test_proposals_depend_on_the_seed_and_the_trials_alone() -> None:
    one, _ = proposed(MINI, 9)
    assert proposed(MINI, 9)[0] == one
    other = replace(MINI, seed=MINI.seed + 1)
    assert proposed(other, 9)[0] != one


def test_repeats_and_others_trials_are_nobody_s_example() -> None:
    _, trials = proposed(RSICAP, 8)
    low = dict(trials[0].params)
    low["learning_rate"] = RSICAP.space["learning_rate"].low
    plan = Laddered(RSICAP, PRIOR)
    repeat = trial(RSICAP, low, (0.01,), **{records.REPEAT_OF: 0})
    foreign = create_trial(value=0.01, intermediate_values={1: 0.01})
    nan = trial(RSICAP, low, (math.nan,))
    assert plan._good([*trials, repeat, foreign, nan]) == plan._good(trials)


@pytest.mark.parametrize(
    "space",
    [
        {"lora_r": Choice((4, 8, 16)), "lora_dropout": Choice((0.0, 0.1))},
        {"lora_r": Int(4, 8)},
        {"learning_rate": Float(1e-4, 1e-4), "num_epochs": Int(2, 4)},
    ],
    ids=str,
)
def test_a_finite_space_has_no_configuration_twice(space: Any) -> None:
    study = Study(name="s", description="", space=space, n_trials=1)
    params, _ = proposed(study, {2: 6, 1: 5}[len(space)] if "learning_rate" not in space else 3)
    assert len({tuple(sorted(each.items())) for each in params}) == len(params)
    for each in params:
        assert all(contains(param, each[param_name(field, param)]) for field, param in space.items())
    # Once it is done, something is proposed all the same.
    assert proposed(study, len(params) + 1)[0][-1]


@pytest.mark.parametrize("strategy", [RUNGS, FREEZE_THAW, "joint"])
def test_a_trial_beside_a_finite_space_takes_none_of_its_points(strategy: str) -> None:
    """One given by hand with an epoch instead of two: its point in full was never trained, and another one twice."""
    space = {"lora_r": Choice((4, 8)), "batch_size": Choice((4, 8))}
    definition = Study(name="s", description="", space=space, n_trials=5)
    study = optuna.create_study(sampler=make_sampler(definition, strategy))
    asked = {param_name(f, p): distribution(p) for f, p in space.items()}
    for rank, batch, given in ((4, 4, {"num_epochs": 1}), (4, 8, {}), (8, 4, {}), (8, 8, {})):
        attrs = {records.OVERRIDES: given}
        study.add_trial(trial(definition, {"lora_r": rank, "batch_size": batch}, (0.6, 0.5), **attrs))
    assert study.ask(asked).params == {"lora_r": 4, "batch_size": 4}


def test_van_der_corput() -> None:
    assert [van_der_corput(n) for n in range(8)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]


def test_the_strategy_brings_its_pruner() -> None:
    assert isinstance(make_sampler(MINI, RUNGS), AimedSampler)
    assert default_pruner(RUNGS) == "rungs"
    assert isinstance(plan_of(pruner_for("rungs", MINI)), RungPlan)


@pytest.mark.parametrize(
    ("losses", "gains"),
    [
        ((0.5, 0.4), True),
        ((0.5, 0.4, 0.403, 0.402, 0.4035), True),  # flat: within an evaluation's noise
        ((0.5, 0.4, 0.41, 0.42, 0.43), False),
        ((0.5, 0.4, 0.45, 0.401, 0.5), True),
        ((0.5, 0.4, 0.401, 0.41, 0.42, 0.43, 0.421), True),
        ((0.5, 0.4, 0.401, 0.41, 0.42, 0.43, 0.45, 0.47), False),  # flat once, and far above by now
        ((math.nan,), False),
        ((math.nan, 0.4, 0.401), True),
    ],
)
def test_a_flat_loss_does_not_rise(losses: tuple[float, ...], gains: bool) -> None:
    study = optuna.create_study()
    own = create_trial(state=TrialState.RUNNING, intermediate_values=dict(enumerate(losses, 1)))
    study.add_trial(own)
    assert RungPlan(20).may_gain(study.trials, own) == gains


def running(number: int, losses: tuple[float, ...], state: str = "RUNNING") -> FrozenTrial:
    """A trial so far; paused if it is WAITING."""
    found = create_trial(
        state=TrialState[state],
        value=min(losses) if state == "COMPLETE" else None,
        intermediate_values=dict(enumerate(losses, 1)),
        user_attrs={records.REASON: records.PAUSED} if state == "WAITING" else {},
    )
    found.number = number
    return found


def test_once_nothing_is_left_to_begin_the_leaders_go_on_to_their_end() -> None:
    """The furthest first; who is no leader is given up."""
    plan = RungPlan(20)
    trials = [running(n, (0.5 + n / 100,), "WAITING") for n in range(LEADERS + 3)]
    trials[1] = running(1, (0.51, 0.47, 0.46), "WAITING")
    trials[2] = running(2, (0.52, 0.50, 0.49), "COMPLETE")
    assert plan.resume(trials, new_left=True) == 0, "one of the best third of its rung"
    order = []
    while (number := plan.resume(trials, new_left=False)) is not None:
        order.append(number)
        losses = tuple(trials[number].intermediate_values.values())
        # Each keeps its place: at no rung it waits again.
        while len(losses) < 20:
            losses = (*losses, losses[-1] * 0.999)
            trials[number] = running(number, losses)
            assert plan.pause(trials, trials[number], new_left=False) is None
        trials[number] = running(number, losses, "COMPLETE")
    assert order == [0, 1, 3, 4], "the best third of a rung, then those with the lowest losses, one of which has ended"
    assert plan.wanted(trials) == 0


def test_what_a_budget_has_left_brings_leaders_to_their_end_and_not_all_of_them_on_their_way() -> None:
    plan = RungPlan(20)
    trials = [running(n, (0.6, 0.55, 0.5 + n / 100), "WAITING") for n in range(LEADERS)]
    assert [plan.resume(trials, new_left=False, left=left) for left in (1, 17, 34)] == [0, 0, 0], "17 epochs each"
    trials[0] = running(0, (0.6, 0.55, 0.5))
    assert plan.resume(trials, new_left=False, left=33) is None, "enough for the one that is training, alone"
    assert plan.resume(trials, new_left=False, left=34) == 1
    assert plan.pause(trials, trials[0], new_left=False, left=1) is None, "the best goes on to the last epoch"
    second = running(1, tuple(trials[1].intermediate_values.values()))
    assert plan.pause([trials[0], second, *trials[2:]], second, new_left=False, left=34) is None
    why = plan.pause([trials[0], second, *trials[2:]], second, new_left=False, left=33)
    assert why == "the 33 epochs that are left go to leaders that can reach their end"
    trials[0] = running(0, (0.6, 0.55, 0.5) + (0.4,) * 17, "COMPLETE")
    assert plan.resume(trials, new_left=False, left=3) == 1, "what is left when all that could have ended"
    two, beside = [second, trials[2]], running(9, (0.6,) * 4)
    for left, goes_on in ((38, None), (39, 2)):
        assert RungPlan(20, leaders=2).resume([*two, beside], new_left=False, left=left) == goes_on
    third = running(2, (0.45,), "WAITING")
    for began, goes_on in ((0.4, None), (0.6, 2)):
        ended = [running(n, (began, *(0.4,) * 19), "COMPLETE") for n in range(2)]
        assert RungPlan(20, leaders=2).resume([*ended, third], new_left=False, left=9) == goes_on, "by rungs again"
    near = running(4, (0.6,) * 18 + (0.545,), "WAITING")
    assert plan.resume([*trials[:4], near], new_left=False, left=18) == 4, "two of them: the furthest first"


def test_where_the_number_of_epochs_is_searched_each_trial_has_its_own_end() -> None:
    """The base's ended all before: a longer leader lacked nothing, and was given up beside one that had ended."""
    study = Study(
        name="lengths",
        description="",
        base={"model": "mini", "data": "mini", "max_samples": 80, "num_epochs": 4},
        space={"learning_rate": Float(1e-5, 1e-3, log=True), "num_epochs": Choice((3, 12))},
        n_trials=3,
    )
    assert study.most_epochs() == 12 == Study(**{**vars(study), "space": {"num_epochs": Int(2, 12)}}).most_epochs()
    assert MINI.most_epochs() == MINI.base_config().num_epochs
    plan = rung_plan(study)

    def begun(number: int, epochs: int, losses: tuple[float, ...], state: str = "RUNNING") -> FrozenTrial:
        found = running(number, losses, state)
        found.set_user_attr(records.CONFIG, {**study.base_config().model_dump(mode="json"), "num_epochs": epochs})
        return found

    short, long = begun(0, 3, (0.6, 0.55), "WAITING"), begun(1, 12, (0.6, 0.5, 0.45, 0.44), "WAITING")
    assert plan.wanted([short, long]) == 1 + 8
    assert plan.resume([short, long], new_left=False) == 1
    assert plan.resume([short, begun(1, 12, (0.4,) * 12, "COMPLETE")], new_left=False) == 0
    others = [begun(n, 12, (0.3, 0.3, 0.3, 0.3)) for n in range(2, 8)]
    at_its_end, on_its_way = begun(0, 3, (0.6, 0.55, 0.5)), begun(1, 12, (0.6, 0.5, 0.45))
    assert plan.pause([at_its_end, *others], at_its_end, new_left=True) is None, "its last epoch is none to wait at"
    assert plan.pause([on_its_way, *others], on_its_way, new_left=True) is not None


def test_trials_that_wait_to_begin_may_take_a_trial_s_place() -> None:
    """Given by hand, they count from the start, so that no other is left: of nine all were trained to their end."""
    study = optuna.create_study(pruner=pruner_for("rungs", MINI, Budget(3)))
    for number in range(3):
        study.enqueue_trial({"learning_rate": 10.0 ** (number - 6)})
    began = study.ask()
    began.set_user_attr(records.CONFIG, MINI.base_config().model_dump(mode="json"))
    began.report(0.5, 1)
    pruner = study.pruner
    assert isinstance(pruner, PausingPruner)

    def paused() -> bool:
        outcome = pruner.verdict(study, study.trials[0])
        return outcome is not None and outcome.state == "WAITING"

    assert paused()
    for _ in range(2):
        study.ask()
    assert not paused(), "one of the five leaders, and nothing could begin in its place"


def test_what_the_leaders_lack_is_kept_of_a_budget_of_epochs() -> None:
    """Up to half of it: a budget of one trial's epochs begins several."""
    plan = RungPlan(20)
    trials = [running(n, (0.5 + n / 100,), "WAITING") for n in range(7)]
    assert plan.wanted(trials) == LEADERS * 19
    few, more = Budget(100, epochs=20), Budget(100, epochs=200)
    assert few.new_left(trials, plan) and not few.new_left([*trials, *trials[:3]], plan)
    assert more.new_left(trials, plan) and Budget(100, epochs=11).new_left([*trials, *trials[:3]])
    assert not Budget(100, epochs=102).new_left([*trials, running(7, (0.6,) * 44)], plan)
    assert Budget(100, epochs=102).new_left([*trials, running(7, (0.6,) * 43)], plan)
    beyond = running(8, (0.1,) * 30)  # a trial of its own number of epochs
    assert plan.wanted([beyond]) == 0 and not Budget(9, epochs=30).new_left([beyond], plan)
    assert not Budget(7).new_left(trials) and Budget(8).new_left(trials)


def test_without_a_plan_the_epochs_of_running_trials_are_kept() -> None:
    """A trial that has begun goes on to its end: sixteen of 6 epochs began with a budget of 12."""
    begun = [running(n, (), "RUNNING") for n in range(2)]
    for trial in begun:
        trial.user_attrs[records.CONFIG] = {**trial.user_attrs.get(records.CONFIG, {}), "num_epochs": 6}
    assert Budget(99, epochs=12).new_left(begun[:1]) and not Budget(99, epochs=12).new_left(begun)
    assert Budget(99, epochs=13).new_left(begun)
    done = running(2, (0.5,) * 3, "PRUNED")
    assert not Budget(99, epochs=15).new_left([*begun, done]) and Budget(99, epochs=16).new_left([*begun, done])


def test_without_a_plan_a_trial_begins_if_its_epochs_are_left() -> None:
    """Else a budget of 25 epochs took 40; the first begins in any case. One that was just asked for counts in full."""
    done, asked = running(0, (0.5,) * 20, "COMPLETE"), running(1, ())
    assert not Budget(99, epochs=25, each=20).new_left([done]) and Budget(99, epochs=40, each=20).new_left([done])
    assert Budget(99, epochs=3, each=20).new_left([])
    assert not Budget(99, epochs=40, each=20).new_left([done, asked])
    assert Budget(99, epochs=60, each=20).new_left([done, asked])
    assert Budget(99, epochs=25, each=20).new_left([done], RungPlan(20)), "which pauses what begins"
    beside = [running(number, ()) for number in range(1, 6)]
    assert [Budget(99, epochs=25).new_left([done, *beside[:n]], RungPlan(20)) for n in (4, 5)] == [True, False]
    repeat = running(6, ())
    repeat.set_user_attr(records.REPEAT_OF, 0)
    assert Budget(99, epochs=25).new_left([done, *beside[:4], repeat], RungPlan(20)), "none of the search's own"


@pytest.mark.parametrize("number", [1, 3, 12, 40])
@pytest.mark.parametrize("num_epochs", [1, 6, 20])
def test_what_so_many_configurations_come_to(number: int, num_epochs: int) -> None:
    """Played with losses that fall alike: as many epochs as expected, and some for early ones that others overtake."""
    plan, trials = RungPlan(num_epochs), [running(n, ()) for n in range(number)]
    places = np.random.default_rng(0).permutation(number)
    left: list[int] = list(range(number))
    while True:
        begun = left.pop(0) if left else plan.resume([t for t in trials if t.intermediate_values], new_left=False)
        if begun is None:
            break
        losses = tuple(trials[begun].intermediate_values.values())
        while len(losses) < num_epochs:
            losses = (*losses, float(1 + places[begun] / 100 + 1 / (len(losses) + 1)))
            trials[begun] = running(begun, losses)
            seen = [t for t in trials if t.intermediate_values]
            if len(losses) < num_epochs and plan.pause(seen, trials[begun], new_left=bool(left)):
                break
        trials[begun] = running(begun, losses, "WAITING" if len(losses) < num_epochs else "COMPLETE")
    spent = sum(len(t.intermediate_values) for t in trials)
    assert plan.expected(number) <= spent <= 1.25 * plan.expected(number)
    assert spent <= number * num_epochs
