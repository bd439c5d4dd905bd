"""The stages of `--strategy staged`."""

import math
from dataclasses import replace

import pytest
from optuna.trial import TrialState

from search import records
from search.sampling.params import distribution, mark_constraints, suggest
from search.sampling.staged import CAPACITY, RATE, STABILITY, TOGETHER, is_probe, stage_overrides
from search.space import Choice, Float, Int
from search.study import Fixed
from studies.rsicap_mini import STUDY as MINI
from tests.search.sampling.runs import RATE_HIGH, in_memory, loss_of, restarted, run_trial


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
