"""Params: ranges, and the constraints that keep TPE away from cliffs."""

import math
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from search import records
from search.sampling.params import CONSTRAINTS, distribution, mark_constraints, suggest
from search.space import Choice, Float, Int, Multiple
from search.study import Study
from studies.rsicap_mini import STUDY as MINI
from tests.search.sampling.runs import in_memory


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
