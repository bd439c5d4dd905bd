"""Samplers: ranges, seeds and restarts, cliffs, grids, and the stages of `--strategy staged`."""

import math
from dataclasses import replace

import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from search import records
from search.errors import StudyError
from search.sampling import samplers
from search.sampling.samplers import (
    CONSTRAINTS,
    N_STARTUP_TRIALS,
    distribution,
    grid_size,
    make_sampler,
    mark_constraints,
    suggest,
)
from search.sampling.staged import CAPACITY, RATE, STABILITY, TOGETHER, is_probe, stage_overrides
from search.space import Choice, Float, Int, Multiple
from search.storage.studies import close_storage, open_storage, open_study, park, requeue_lost
from search.study import Fixed, Study
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


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


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
    if is_probe(trial):
        trial.set_user_attr(records.REASON, records.PROBE)
        optuna_study.tell(trial, state=TrialState.PRUNED)
    else:
        optuna_study.tell(trial, value)
    return trial


def in_memory(study, strategy="joint", n_trials=None):
    return optuna.create_study(sampler=make_sampler(study, strategy, n_trials))


def params_of(optuna_study):
    """Params of the finished trials in the order in which they ran."""
    done = [t for t in optuna_study.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    return [t.params for t in done]


# Params


def test_params_come_in_the_order_of_the_space_and_stay_in_range():
    study = in_memory(MINI)
    for _ in range(12):
        params = suggest(study.ask(), MINI)
        assert list(params) == [
            "learning_rate",
            "lora_r",
            "lora_alpha_per_lora_r",
            "lora_dropout",
            "batch_size",
            "warmup_steps",
        ]
        MINI.config(params)


@pytest.mark.parametrize(
    "param",
    [Float(0.1, 1), Float(1e-5, 1, log=True), Int(1, 9), Int(1, 9, log=True), Choice(("a", "b")), Choice((1, 2))],
)
def test_what_is_suggested_has_the_distribution(param):
    field = "learning_rate" if not isinstance(param, Choice) else "lr_scheduler_type"
    trial = optuna.create_study().ask()

    class Space:
        space = {field: param}

    suggest(trial, Space())
    assert trial.distributions == {field: distribution(param)}


def test_a_multiple_is_sampled_as_its_factors():
    assert distribution(Multiple("lora_r", (1, 2))) == optuna.distributions.CategoricalDistribution((1, 2))


def test_params_a_trial_has_are_kept():
    study = in_memory(MINI)
    study.enqueue_trial({"learning_rate": 1e-4, "lora_alpha_per_lora_r": 4})
    params = suggest(study.ask(), MINI)
    assert (params["learning_rate"], params["lora_alpha_per_lora_r"]) == (1e-4, 4)


# Seeds and restarts

N = N_STARTUP_TRIALS + 6


@pytest.fixture
def storage(tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    yield storage
    close_storage(storage)


def undisturbed(study, strategy, n=N, **options):
    run = in_memory(study, strategy, n)
    for _ in range(n):
        run_trial(run, study, **options)
    return params_of(run)


def restarted(storage, study, strategy, n=N):
    """The study as a new process sees it."""
    return open_study(storage, study, sampler=make_sampler(study, strategy, n))


STUDIES = [
    pytest.param(MINI, "joint", id="tpe"),
    pytest.param(replace(MINI, sampler="random"), "joint", id="random"),
    pytest.param(GRID, "joint", id="grid"),
    pytest.param(MINI, "staged", id="staged"),
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


@pytest.mark.parametrize(("study", "strategy"), STUDIES)
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


@pytest.mark.parametrize("strategy", ["joint", "staged"])
def test_tpe_told_the_space_samples_what_tpe_samples(monkeypatch, strategy):
    """With trials given by hand, pruned, violated and failed, and several running at once."""

    def params(n_trials):
        study = in_memory(by_hand, strategy, n_trials)
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


# Constraints


def test_marks():
    study = in_memory(MINI)
    trial = study.ask()
    mark_constraints(trial, records.OUT_OF_MEMORY)
    other = study.ask()
    mark_constraints(other, None)
    assert study.trials[0].constraints == {records.NON_FINITE: 0.0, records.OUT_OF_MEMORY: 1.0}
    assert study.trials[1].constraints == dict.fromkeys(CONSTRAINTS, 0.0)
    with pytest.raises(ValueError, match="violated='rising'"):
        mark_constraints(study.ask(), records.RISING)


CLIFF = Study(name="cliff", description="", space={"learning_rate": Float(1e-6, 1e-2, log=True)}, n_trials=50)


def wasted(seed, as_fail):
    """Trials of 50 beyond a cliff of NaN at 3e-4, beside the optimum."""
    study = replace(CLIFF, seed=seed)
    run = in_memory(study)
    count = 0
    for _ in range(50):
        trial = run.ask()
        rate = suggest(trial, study)["learning_rate"]
        if rate <= 3e-4:
            mark_constraints(trial, None)
            run.tell(trial, (math.log10(rate) - math.log10(2.9e-4)) ** 2)
            continue
        count += 1
        if not as_fail:
            mark_constraints(trial, records.NON_FINITE)
        run.tell(trial, state=TrialState.FAIL if as_fail else TrialState.PRUNED)
    return count


def test_tpe_keeps_away_from_a_cliff_it_is_told_of():
    pruned = [wasted(seed, as_fail=False) for seed in range(4)]
    failed = [wasted(seed, as_fail=True) for seed in range(4)]
    assert sum(pruned) < 0.75 * sum(failed), (pruned, failed)


def beyond_after_pruned_trials(violated):
    """How many of 20 samples lie beyond the cliff, after 20 PRUNED trials of which those beyond it got furthest."""
    run = in_memory(CLIFF)
    rates = []
    for _ in range(40):
        trial = run.ask()
        rates.append(suggest(trial, CLIFF)["learning_rate"])
        beyond = rates[-1] > 3e-4
        for epoch in range(1, 6 if beyond else 3):
            trial.report(1.0, step=epoch)
        mark_constraints(trial, violated if beyond else None)
        run.tell(trial, state=TrialState.PRUNED)
    return sum(rate > 3e-4 for rate in rates[20:])


def test_it_is_the_constraint_that_counts_among_pruned_trials():
    assert beyond_after_pruned_trials(records.NON_FINITE) <= 5
    assert beyond_after_pruned_trials(None) >= 10


# Grids


def test_a_grid_visits_each_point_once_whatever_is_queued_or_lost(storage):
    by_hand = Fixed(label="hand", config={"lora_r": 16})
    study = replace(GRID, enqueue=(by_hand,))
    assert grid_size(study) == 12
    for turn in range(13):
        run = restarted(storage, study, "joint")
        if turn in (3, 7):
            run.ask().set_user_attr(records.WORKER, {"host": "here", "pid": 1, "started_s": 0.0})
            requeue_lost(run, is_alive=lambda worker: False)
        run_trial(run, study)
    hand, *points = params_of(run)
    assert hand["lora_r"] == 16
    assert len({tuple(p.items()) for p in points}) == 12


def test_workers_at_once_take_different_points():
    run = in_memory(GRID)
    trials = [run.ask() for _ in range(12)]
    points = [tuple(suggest(trial, GRID).items()) for trial in trials]
    assert len(set(points)) == 12
    for trial in trials:
        run.tell(trial, 1.0)  # Optuna's own grid sampler raises here, at the last


def test_a_grid_with_ranges_is_refused():
    with pytest.raises(StudyError, match="takes Choice and Multiple alone, but has learning_rate=Float"):
        make_sampler(replace(MINI, sampler="grid"))
    assert grid_size(MINI) is None


def test_unknown_strategies_are_refused():
    with pytest.raises(StudyError, match="did you mean 'staged'"):
        make_sampler(MINI, "stages")
    with pytest.raises(StudyError, match="has no stages"):
        make_sampler(GRID, "staged")


# Stages


def staged_run(study, n, unstable_above=math.inf):
    run = in_memory(study, "staged", n)
    for _ in range(n):
        run_trial(run, study, unstable_above)
    return run


def by_stage(run):
    stages = {}
    for trial in run.trials:
        stages.setdefault(trial.user_attrs.get(records.STAGE), []).append(trial)
    return stages


def values(trials, name):
    return {t.params[name] for t in trials}


def test_the_order_of_the_stages():
    run = staged_run(MINI, 24)
    order = [t.user_attrs[records.STAGE] for t in run.trials]
    assert order == [STABILITY] + [RATE] * 12 + [CAPACITY] * 6 + [TOGETHER] * 5


def test_a_probe_is_short_and_at_the_top():
    (probe,) = by_stage(staged_run(MINI, 12))[STABILITY]
    assert probe.params == {
        "learning_rate": RATE_HIGH,
        "lora_r": 8,
        "lora_alpha_per_lora_r": 2,
        "lora_dropout": 0.1,
        "batch_size": 4,
        "warmup_steps": 0,
    }
    assert stage_overrides(probe) == {"num_epochs": 1}
    assert MINI.config(probe.params, stage_overrides(probe)).num_epochs == 1
    space = {"learning_rate": MINI.space["learning_rate"]}
    (probe,) = by_stage(staged_run(replace(MINI, space=space), 8))[STABILITY]
    assert stage_overrides(probe) == {"num_epochs": 1, "warmup_steps": 0}


def is_near(param, value, best):
    """Whether the value lies within a quarter of the range to either side of the best."""
    scale = math.log if param.log else float
    quarter = (scale(param.high) - scale(param.low)) / 4
    return abs(scale(value) - scale(best)) <= quarter + 1e-9


def test_what_each_stage_holds_fixed():
    run = staged_run(MINI, 32)
    stages = by_stage(run)
    assert values(stages[RATE], "lora_r") == {8}
    assert values(stages[RATE], "lora_alpha_per_lora_r") == {2}
    assert values(stages[RATE], "lora_dropout") == {0.1}
    assert len(values(stages[RATE], "learning_rate")) > 5
    assert len(values(stages[RATE], "batch_size")) > 1

    best = min(stages[RATE], key=lambda t: t.value)
    first, *others = stages[CAPACITY]
    for name in ("learning_rate", "batch_size", "warmup_steps"):
        assert first.params[name] == best.params[name]
        assert values(others, name) == {best.params[name]}
    assert len(values(stages[CAPACITY], "lora_r")) > 1

    assert len(values(stages[TOGETHER], "learning_rate")) > 1
    assert len(values(stages[TOGETHER], "lora_dropout")) > 1
    full = {name: distribution(param) for name, param in MINI.space.items() if name != "lora_alpha"}
    assert all(full.items() <= t.distributions.items() for t in run.trials)


def test_the_last_stage_stays_near_the_best():
    run = staged_run(replace(MINI, sampler="random"), 32)  # TPE would stay there by itself
    stages = by_stage(run)
    for trial in stages[TOGETHER]:
        earlier = [t for t in run.trials[: trial.number] if t.state == TrialState.COMPLETE]
        best = min(earlier, key=lambda t: t.value)
        for name in ("learning_rate", "lora_r", "lora_dropout", "batch_size", "warmup_steps"):
            assert is_near(MINI.space[name], trial.params[name], best.params[name]), name


def test_rates_that_proved_unstable_are_not_sampled():
    stages = by_stage(staged_run(MINI, 24, unstable_above=0.3 * RATE_HIGH))
    rates = [t.params["learning_rate"] for t in stages[STABILITY]]
    assert rates == pytest.approx([RATE_HIGH, RATE_HIGH / 2, RATE_HIGH / 4])
    later = [t.params["learning_rate"] for s in (RATE, CAPACITY, TOGETHER) for t in stages[s]]
    assert max(later) <= rates[-1]
    assert max(later) > 0.5 * rates[-1]


def test_if_no_probe_is_stable_the_rates_stay_below_all_of_them():
    stages = by_stage(staged_run(MINI, 12, unstable_above=1e-9))
    assert len(stages[STABILITY]) == 3
    assert all(t.params["learning_rate"] <= RATE_HIGH / 8 for s in (RATE, CAPACITY) for t in stages[s])


def test_a_probe_that_runs_out_of_memory_says_nothing_about_its_rate():
    run = in_memory(MINI, "staged", 12)
    for _ in range(12):
        trial = run.ask()
        params = suggest(trial, MINI)
        mark_constraints(trial, records.OUT_OF_MEMORY if is_probe(trial) else None)
        trial.report(loss_of(params), step=1)
        run.tell(trial, state=TrialState.PRUNED)
    stages = by_stage(run)
    assert len(stages[STABILITY]) == 3
    assert max(values(stages[RATE], "learning_rate")) > RATE_HIGH / 4


def test_probes_asked_for_at_once_fall_too():
    run = in_memory(MINI, "staged", 12)
    rates = [suggest(run.ask(), MINI)["learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([RATE_HIGH, RATE_HIGH / 2, RATE_HIGH / 4])
    assert run.ask().user_attrs[records.STAGE] == RATE


def test_trials_given_by_hand_have_no_stage_and_their_overrides():
    study = replace(MINI, enqueue=(Fixed(label="1", config={"learning_rate": 1e-4, "max_samples": 20}),))
    run = in_memory(study, "staged", 12)
    run.enqueue_trial({"learning_rate": 1e-4}, user_attrs={records.LABEL: "1", records.OVERRIDES: {"max_samples": 20}})
    trial = run_trial(run, study)
    assert records.STAGE not in trial.user_attrs
    assert stage_overrides(trial) == {"max_samples": 20}
    assert is_probe(run_trial(run, study))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (("learning_rate", "warmup_steps"), {STABILITY, RATE, TOGETHER}),
        (("lora_r", "lora_alpha"), {CAPACITY, TOGETHER}),
        (("lora_r", "lora_alpha", "batch_size"), {RATE, CAPACITY, TOGETHER}),
        (("lora_dropout",), {CAPACITY, TOGETHER}),
    ],
)
def test_stages_without_params_are_left_out(fields, expected):
    study = replace(MINI, space={name: MINI.space[name] for name in fields})
    assert set(by_stage(staged_run(study, 16))) == expected


def test_other_kinds_of_space():
    space = {
        "learning_rate": Choice((1e-3, 1e-4)),
        "lora_r": Int(16, 32, log=True),
        "lora_alpha": Float(1, 8),
        "lr_scheduler_type": Choice(("linear", "cosine")),
        "weight_decay": Float(0.0, 0.1),
    }
    stages = by_stage(staged_run(replace(MINI, space=space), 16))
    assert set(stages) == {RATE, CAPACITY, TOGETHER}
    assert values(stages[RATE], "lora_r") == {16}
    assert values(stages[RATE], "lora_alpha") == {8}


def test_more_trials_never_lead_back_to_an_earlier_stage(storage):
    for _ in range(12):
        run_trial(restarted(storage, MINI, "staged", 12), MINI)
    for _ in range(12):
        run_trial(restarted(storage, MINI, "staged", 24), MINI)
    stages = [t.user_attrs[records.STAGE] for t in restarted(storage, MINI, "staged", 24).trials]
    assert stages[11:] == [TOGETHER] * 13


def test_a_budget_too_small_for_probes():
    assert STABILITY not in by_stage(staged_run(MINI, 3))
