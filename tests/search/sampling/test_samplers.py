"""Samplers: seeds and restarts, and grids."""

from dataclasses import replace

import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from search import records
from search.errors import StudyError
from search.planning.candidates import Candidates
from search.sampling import samplers
from search.sampling.make import make_sampler
from search.sampling.params import suggest
from search.sampling.samplers import N_STARTUP_TRIALS
from search.space import Choice, Float, Int, points, size
from search.storage.lifecycle import park, requeue_lost
from search.storage.studies import open_study
from search.study import Fixed
from studies.rsicap_mini import STUDY as MINI
from tests.search.sampling.runs import GRID, RATE_HIGH, in_memory, loss_of, params_of, restarted, run_trial

# Seeds and restarts

N = N_STARTUP_TRIALS + 6


def undisturbed(study, strategy, n=N, **options):
    run = in_memory(study, strategy)
    for _ in range(n):
        run_trial(run, study, **options)
    return params_of(run)


FINITE = replace(MINI, space={"learning_rate": Choice((1e-4, 3e-4, 1e-3)), "lora_r": Int(4, 7)})
"""12 configurations."""
STUDIES = [
    pytest.param(MINI, "joint", id="tpe"),
    pytest.param(replace(MINI, sampler="random"), "joint", id="random"),
    pytest.param(GRID, "joint", id="grid"),
    pytest.param(FINITE, "joint", id="finite"),
    pytest.param(replace(FINITE, sampler="random"), "joint", id="finite, random"),
]


@pytest.mark.parametrize(("study", "strategy"), STUDIES)
def test_the_same_seed_gives_the_same_study(study, strategy):
    first = undisturbed(study, strategy)
    assert undisturbed(study, strategy) == first
    assert undisturbed(replace(study, seed=1), strategy) != first


@pytest.mark.parametrize(("study", "strategy"), STUDIES)
def test_a_study_restarted_before_each_trial_is_the_undisturbed_one(storage, study, strategy):
    for _ in range(N):
        run_trial(restarted(storage, study, strategy), study)
    assert params_of(restarted(storage, study, strategy)) == undisturbed(study, strategy)


@pytest.mark.parametrize(
    ("study", "strategy"),
    # Each sampler is restarted above; the others of these take two seconds each.
    [
        each if each.id in ("tpe", "finite") else pytest.param(*each.values, id=each.id, marks=pytest.mark.long)
        for each in STUDIES
    ],
)
def test_trials_parked_and_lost_on_the_way_change_nothing(storage, study, strategy):
    """Ctrl-C in every third trial, a killed process in every fourth: twice, once before it had its params."""
    for turn in range(N):
        if turn % 3 == 1:
            run = restarted(storage, study, strategy)
            trial = run.ask()
            suggest(trial, study)
            park(run, trial)
        if turn % 4 == 2:
            for suggests in (False, True):
                run = restarted(storage, study, strategy)
                trial = run.ask()
                if suggests:
                    suggest(trial, study)
                trial.set_user_attr(records.WORKER, {"host": "here", "pid": 1, "started_s": 0.0})
                assert len(requeue_lost(run, is_alive=lambda worker: False)) == 1
        run_trial(restarted(storage, study, strategy), study)
    assert params_of(restarted(storage, study, strategy)) == undisturbed(study, strategy)


def test_tpe_is_beyond_its_random_trials():
    """What the tests above compare is TPE, not chance: after the startup the values told decide."""
    told = []
    for sign in (1, -1):
        study = in_memory(MINI)
        for _ in range(N_STARTUP_TRIALS + 1):
            trial = study.ask()
            study.tell(trial, sign * loss_of(suggest(trial, MINI)))
        told.append(params_of(study))
    assert told[0][:N_STARTUP_TRIALS] == told[1][:N_STARTUP_TRIALS]
    assert told[0][-1] != told[1][-1]


def test_tpe_learns_nothing_from_losses_on_other_samples():
    """Two of them, the lowest of all, among random trials: neither the startup nor what is good is about them."""
    told = []
    for loss in (0.1, 9.0):
        study = in_memory(MINI)
        for place in range(N_STARTUP_TRIALS + 1):
            if place in (1, 3):
                others = {"max_samples": MINI.base["max_samples"] + 40 * place}
                study.enqueue_trial({"lora_r": 4}, user_attrs={records.OVERRIDES: others})
                study.tell(study.ask(), loss)
            trial = study.ask()
            study.tell(trial, loss_of(suggest(trial, MINI)))
        told.append([params for params in params_of(study) if len(params) > 1])
    assert len(told[0]) == N_STARTUP_TRIALS + 1 and told[0] == told[1]


def test_tpe_told_the_space_samples_what_tpe_samples(monkeypatch):
    """With trials given by hand, pruned, violated and failed, and several running at once."""

    def params(n_trials):
        study = in_memory(by_hand)
        study.enqueue_trial({"lora_r": 5, "learning_rate": 2e-4})
        held = []
        for index in range(n_trials):
            if index % 6 == 4:
                held.append(study.ask())
                suggest(held[-1], by_hand)
            elif index % 7 == 5:
                study.tell(study.ask(), state=TrialState.FAIL)
            else:
                run_trial(study, by_hand, unstable_above=RATE_HIGH / 2)
        return [t.params for t in study.trials]

    by_hand = replace(MINI, space={**MINI.space, "weight_decay": Float(0.01, 0.01)})
    told = params(24)
    monkeypatch.setattr(samplers.KnownSpaceTPE, "infer_relative_search_space", TPESampler.infer_relative_search_space)
    assert told == params(24)
    assert len({p["learning_rate"] for p in told if p}) > 12


def test_a_sampler_seeded_once_repeats_itself_after_a_restart(storage):
    """The reason for SeededByTrial."""
    for _ in range(2):
        run = open_study(storage, MINI, sampler=optuna.samplers.TPESampler(seed=0))
        run_trial(run, MINI)
    first, second = params_of(run)
    assert first == second


# Grids


def test_a_grid_visits_each_point_once_whatever_is_queued_or_lost(storage):
    by_hand = Fixed(label="hand", config={"lora_r": 16})
    study = replace(GRID, enqueue=(by_hand,))
    for turn in range(13):
        run = restarted(storage, study, "joint")
        if turn in (3, 7):
            run.ask().set_user_attr(records.WORKER, {"host": "here", "pid": 1, "started_s": 0.0})
            requeue_lost(run, is_alive=lambda worker: False)
        run_trial(run, study)
    hand, *points = params_of(run)
    assert hand["lora_r"] == 16
    assert len({tuple(p.items()) for p in points}) == 12


def test_a_grid_says_when_it_is_done(storage):
    """A trial beyond would train a point again, with the same result."""
    by_hand = Fixed(label="hand", config={"lora_r": 16})
    study = replace(GRID, enqueue=(by_hand,))
    run = restarted(storage, study, "joint")
    sampler = make_sampler(study)
    assert sampler.total(run) == 1 + 12
    run.enqueue_trial({"lora_r": 8})  # by another program: it takes no point
    assert sampler.total(run) == 2 + 12
    run.ask().set_user_attr(records.WORKER, {"host": "here", "pid": 1, "started_s": 0.0})
    requeue_lost(run, is_alive=lambda worker: False)
    assert sampler.total(run) == 2 + 12


def test_workers_at_once_take_different_points():
    run = in_memory(GRID)
    trials = [run.ask() for _ in range(12)]
    points = [tuple(suggest(trial, GRID).items()) for trial in trials]
    assert len(set(points)) == 12
    for trial in trials:
        run.tell(trial, 1.0)  # Optuna's own grid sampler raises here, at the last


def test_a_grid_with_ranges_is_refused():
    with pytest.raises(StudyError, match="must be Choice or Multiple, but it has learning_rate=Float"):
        make_sampler(replace(MINI, sampler="grid"))


# Finite spaces


@pytest.mark.parametrize(("strategy", "sampler"), [("joint", "tpe"), ("joint", "random"), ("freeze-thaw", "tpe")])
def test_no_configuration_of_a_finite_space_comes_twice(strategy, sampler):
    study = replace(FINITE, sampler=sampler)
    assert size(study.space) == 12
    trained = undisturbed(study, strategy, 12)
    assert len(trained) == 12
    assert {tuple(sorted(p.items())) for p in trained} == {tuple(sorted(p.items())) for p in points(study.space)}


def test_where_all_candidates_have_begun_one_of_those_left_is_taken(monkeypatch):
    always = {"learning_rate": 1e-4, "lora_r": 4}
    monkeypatch.setattr(Candidates, "draw", lambda *_: [always])
    trained = undisturbed(FINITE, "freeze-thaw", 12)
    assert trained[0] == always and len({tuple(sorted(p.items())) for p in trained}) == 12


def test_what_is_drawn_first_in_a_finite_space_is_what_tpe_draws():
    one = in_memory(FINITE)
    other = in_memory(FINITE)
    other.sampler = samplers.SeededByTrial(lambda seed: samplers.base_sampler(FINITE, seed), FINITE.seed)
    run_trial(one, FINITE)
    run_trial(other, FINITE)
    assert params_of(one) == params_of(other)


def test_a_trial_given_by_hand_in_a_finite_space_is_completed_and_not_drawn_again():
    run = in_memory(FINITE)
    run.enqueue_trial({"learning_rate": 1e-4, "lora_r": 5})
    run.enqueue_trial({"lora_r": 6})
    for _ in range(12):
        run_trial(run, FINITE)
    found = params_of(run)
    assert found[0] == {"learning_rate": 1e-4, "lora_r": 5} and found[1]["lora_r"] == 6
    assert len({tuple(sorted(p.items())) for p in found}) == 12


def test_sizes_of_spaces():
    assert size({"lora_r": Int(4, 7), "learning_rate": Float(1e-4, 1e-4)}) == 4
    assert size({"lora_r": Int(4, 7), "learning_rate": Float(1e-5, 1e-4)}) is None
    assert size({}) == 1
