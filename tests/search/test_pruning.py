"""The pruner's rules on recorded curves, on the hand-run log's, and on made-up ones."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial

from search import records
from search.errors import StudyError
from search.pruning import (
    PRUNERS,
    HalvingPruner,
    RisingLossPruner,
    best_value,
    check_name,
    diverged,
    help_text,
    make_pruner,
    pruner_for,
    rising,
    settled,
    verdict,
)
from search.records import Outcome
from search.space import Int
from search.storage.searched import alike
from search.study import Study

RUNS = json.loads((Path(__file__).parents[1] / "data" / "recorded-runs.json").read_text(encoding="utf-8"))["runs"]
NAN = math.nan
PATIENCE = Study.patience

# The hand-run log's experiment 3; validation losses from epoch 4 on continue what it describes.
EXPERIMENT_3_TRAIN = [1.89, 1.71, 1.69, 1.87, 1.95]
EXPERIMENT_3_VAL = [1.63, 1.57, 1.60, 1.71, 1.75]


def curves(run):
    return [e.get("train_loss") for e in run["epochs"]], [e.get("val_loss") for e in run["epochs"]]


def running(val, train=(), number=99, **attrs):
    """A RUNNING trial as the storage returns it, with what it reported so far."""
    trial = create_trial(
        state=TrialState.RUNNING,
        user_attrs={records.TRAIN_LOSSES: list(train), **attrs},
        intermediate_values={epoch: v for epoch, v in enumerate(val, 1) if v is not None},
    )
    trial.number = number
    return trial


def rule(**settings):
    """The rising-loss rule with a study's defaults."""
    return RisingLossPruner(**{"patience": Study.patience, "min_delta": Study.min_delta, **settings})


def named(name, num_epochs=10, **settings):
    """The pruner of this name with a study's defaults."""
    return make_pruner(
        name, num_epochs=num_epochs, **{"patience": Study.patience, "min_delta": Study.min_delta, **settings}
    )


def study_with(values=(), pruned=()):
    study = optuna.create_study(direction="minimize")
    for value in values:
        study.add_trial(create_trial(value=value))
    for curve in pruned:
        study.add_trial(create_trial(state=TrialState.PRUNED, intermediate_values=dict(enumerate(curve, 1))))
    return study


class Unread:
    """A study none of whose trials may be read."""

    def get_trials(self, *args, **kwargs):
        raise AssertionError("the hot path read all trials")


@pytest.mark.parametrize("run", RUNS, ids=[run["name"] for run in RUNS])
def test_no_recorded_run_stops_before_its_best_epoch(run):
    train, val = curves(run)
    best = val.index(min(val)) + 1
    pruner = rule(patience=PATIENCE)
    for epoch in range(1, len(val) + 1):
        stopped = pruner.prune(study_with(), running(val[:epoch], train[:epoch]))
        assert not stopped or epoch >= best, f"stopped at epoch {epoch}, its best comes at {best}"


def test_a_patience_of_one_would_stop_recorded_runs_too_early():
    """What the patience is for: the test above can fail."""
    early = [
        run["name"]
        for run in RUNS
        if any(rising(curves(run)[1][:e], 1) for e in range(1, curves(run)[1].index(min(curves(run)[1])) + 1))
    ]
    assert len(early) >= 4


def test_experiment_3_stops_by_epoch_5():
    pruner = rule(patience=PATIENCE)
    ended = [
        e for e in range(1, 6) if pruner.prune(study_with(), running(EXPERIMENT_3_VAL[:e], EXPERIMENT_3_TRAIN[:e]))
    ]
    assert ended == [4, 5]
    mild = [1.63, 1.57, 1.60, 1.61, 1.62]  # had validation risen only a little
    assert not rising(mild[:4], PATIENCE)
    assert rising(mild, PATIENCE)


def test_experiment_3_shows_its_values():
    found = rule().verdict(study_with(), running(EXPERIMENT_3_VAL[:4], EXPERIMENT_3_TRAIN[:4]))
    assert found == Outcome(
        state="PRUNED",
        reason=records.DIVERGED,
        detail="both losses jump up at epoch 4: training 1.6900 -> 1.8700, validation 1.7100 against 1.5700 at best",
    )


@pytest.mark.parametrize(
    ("val", "patience", "min_delta", "expected"),
    [
        ([], 1, 0, False),
        ([1.0], 1, 0, False),
        ([1.0, 1.1, 1.1], 3, 0, False),
        ([1.0, 1.1, 1.1, 1.1], 3, 0, True),
        ([1.0, 1.1, 1.1, 0.9], 3, 0, False),
        ([1.0, 1.0, 1.0, 1.0], 3, 0, True),
        ([NAN, NAN, NAN], 3, 0, True),
        ([1.0, NAN, None, 1.2], 3, 0, True),
        ([1.0, NAN, None, 0.9], 3, 0, False),
        ([1.0, math.inf, math.inf], 2, 0, True),
        ([1.0, 0.99, 0.985], 2, 0.05, True),
        ([1.0, 0.97, 0.94, 0.91], 3, 0.05, False),  # small gains add up
    ],
)
def test_rising(val, patience, min_delta, expected):
    assert rising(val, patience, min_delta) is expected


@given(st.lists(st.one_of(st.none(), st.floats(0.1, 10), st.just(NAN)), max_size=20), st.integers(1, 5))
def test_rising_never_fires_within_patience_of_the_best(val, patience):
    finite = [v for v in val if v is not None and math.isfinite(v)]
    if finite:
        since = len(val) - 1 - val.index(min(finite))
        assert rising(val, patience) is (since >= patience)
    else:
        assert rising(val, patience) is (len(val) >= patience)


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        ([1.5, 1.6], [1.4, 1.5], True),
        ([1.5, 1.6], [1.4, 1.41], False),  # validation hardly moves
        ([1.5, 1.4], [1.4, 1.9], False),  # overfitting, not divergence
        ([1.5627, 1.5872], [1.4498, 1.4687], False),  # grid_v1's epoch 6
        ([1.5, 1.6], [1.4, NAN], True),
        ([1.5, NAN], [1.4, NAN], True),
        ([1.5, 1.4], [1.4, NAN], False),
        ([1.5, 1.6], [1.4, None], False),
        ([1.5, None], [1.4, 1.6], False),
        ([1.5, 1.6, 1.5], [1.4, 1.5, 1.4], False),  # it jumped and came back
        ([NAN, 1.6], [1.4, 1.6], False),  # nothing to compare the training loss with
        ([1.6], [1.5], False),
        ([], [], False),
    ],
)
def test_diverged(train, val, expected):
    assert diverged(train, val) is expected


def test_a_healthy_epoch_reads_no_other_trial():
    assert rule(patience=2).verdict(Unread(), running([1.5, 1.4, 1.45], [2.0, 1.9, 1.8])) is None


RISING = [1.30, 1.40, 1.41, 1.42]


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ((), "COMPLETE"),
        ((1.0, 1.1), "COMPLETE"),  # too few to say
        ((1.0, 1.1, 1.2), "PRUNED"),
        ((1.0, 1.30, 1.6), "PRUNED"),  # equal to the median is no better
        ((1.0, 1.31, 1.6), "COMPLETE"),
        ((1.4, 1.5, 1.6), "COMPLETE"),  # a record is never thrown away
    ],
)
def test_a_rising_trial_is_judged_by_its_peers(values, state):
    found = rule().verdict(study_with(values), running(RISING))
    assert (found.state, found.reason, found.violated) == (state, records.RISING, None)
    assert found.stopped_early is (state == "COMPLETE")
    assert "1.3000 at epoch 1" in found.detail
    assert "1.4000, 1.4100, 1.4200" in found.detail


def test_pruned_peers_count_with_their_best_and_probes_and_violations_not_at_all():
    study = study_with([1.0], pruned=[[1.5, 1.1, NAN], [1.2, 1.9]])
    assert rule().verdict(study, running(RISING)).state == "PRUNED"

    probes = study_with([1.0, 1.1])
    probes.add_trial(
        create_trial(state=TrialState.PRUNED, intermediate_values={1: 1.2}, user_attrs={records.REASON: records.PROBE})
    )
    probes.add_trial(
        create_trial(state=TrialState.PRUNED, intermediate_values={1: 1.2}, constraints={records.NON_FINITE: 1.0})
    )
    assert rule().verdict(probes, running(RISING)).state == "COMPLETE"


def test_losses_on_other_samples_are_no_peers():
    """Of 20 rows a loss may be far lower than of 2,500, and says nothing about them."""
    few = study_with([])
    for value in (1.0, 1.1, 1.2):
        few.add_trial(create_trial(value=value, user_attrs={records.CONFIG: {"max_samples": 20}}))
    trial = running(RISING)
    assert rule().verdict(few, trial).state == "COMPLETE"
    trial.user_attrs[records.CONFIG] = {"max_samples": 20}
    assert rule().verdict(few, trial).state == "PRUNED"


def test_a_curve_without_any_finite_value_is_pruned():
    found = rule().verdict(study_with(), running([NAN, NAN, NAN]))
    assert (found.state, found.reason, found.violated) == ("PRUNED", records.NON_FINITE, records.NON_FINITE)
    assert not found.stopped_early
    assert found.detail == "no finite validation loss in 3 epochs"


def test_a_missing_report_counts_as_an_evaluation():
    assert rule(patience=3).prune(study_with(), running([1.3, None, None, 1.4]))


def test_the_studys_rule_decides_whatever_an_older_version_recorded():
    recorded = {records.CONFIG: {"learning_rate": 1e-3, "patience": 5, "min_delta": 0.0}}
    assert rule(patience=3).prune(study_with(), running(RISING, **recorded))
    assert not rule(patience=4).prune(study_with(), running(RISING, **recorded))


def test_another_pruner_is_asked_last():
    class Always(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return True

    pruner = rule(other=Always())
    found = pruner.verdict(study_with(), running([1.5, 1.4]))
    assert (found.state, found.reason) == ("PRUNED", records.SUPERSEDED)
    assert "Always" in found.detail
    assert "epoch 2" in found.detail
    assert pruner.verdict(study_with(), running(RISING)).reason == records.RISING
    assert pruner.verdict(study_with(), running([])) is None


@pytest.mark.parametrize("name", PRUNERS)
def test_every_named_pruner_drives_a_study(name):
    study = optuna.create_study(pruner=named(name, num_epochs=9))
    for start in (1.0, 1.1, 1.2, 1.3, 1.4):
        trial = study.ask()
        ended = None
        for epoch in range(1, 10):
            trial.report(start + 0.1 * epoch, step=epoch)
            trial.set_user_attr(records.TRAIN_LOSSES, [1.0] * epoch)
            ended = verdict(study, study.trials[trial.number])
            if ended:
                break
        assert (ended is None) is (name == "none")
        study.tell(trial, state=TrialState.PRUNED)


def test_halving_gives_a_bad_start_up():
    study = optuna.create_study(pruner=named("halving"))
    for value in (1.0, 1.1, 1.2):
        trial = study.ask()
        trial.report(value, step=1)
        found = verdict(study, study.trials[trial.number])
        study.tell(trial, state=TrialState.PRUNED)
    assert found.reason == records.SUPERSEDED


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_halving_takes_back_what_the_first_at_a_rung_were_given(direction):
    """Six trials side by side, the worst one first at each epoch."""
    sign = 1 if direction == "minimize" else -1
    study = optuna.create_study(pruner=HalvingPruner(), direction=direction)
    running = {study.ask().number: sign * value for value in (1.6, 1.5, 1.4, 1.3, 1.2, 1.1)}
    reported = dict.fromkeys(running, 0)
    for epoch in range(1, 7):
        for number, value in list(running.items()):
            trial = optuna.trial.Trial(study, study.trials[number]._trial_id)
            trial.report(value - sign * 0.01 * epoch, step=epoch)
            reported[number] += 1
            if study.pruner.prune(study, study.trials[number]):
                del running[number]
    # All six are best when they come to rung 1; two of six may stay once they all have come, one of two to the end.
    assert list(running) == [5]
    assert [reported[n] for n in range(6)] == [2, 2, 2, 2, 4, 6]


@pytest.mark.parametrize("name", ["median", "halving", "hyperband"])
def test_other_pruners_compare_with_trials_on_the_same_samples(name):
    """Twelve better ones before it, so that either bracket of Hyperband has some: on other samples, and on its own."""

    def judged(samples):
        study = optuna.create_study(pruner=named(name), study_name="two brackets")
        for number in range(13):
            trial = study.ask()
            trial.set_user_attr(records.CONFIG, {"max_samples": samples if number < 12 else 160, "num_epochs": 6})
            for epoch in (1, 2, 3):
                trial.report((0.2 if number < 12 else 0.5) - 0.01 * epoch, epoch)
                own = study.trials[number]
                found = verdict(study, own, lambda own=own: alike(study, own))
                if found is not None:
                    break
            study.tell(trial, 0.2)
        return found

    assert judged(1000) is None
    assert judged(160).reason == records.SUPERSEDED


@pytest.mark.parametrize("begun", [False, True])
def test_halving_counts_a_lost_trial_once(begun):
    """The second best of six, two of whom go on; with the best, which was lost and taken up, twice it was third."""
    study = optuna.create_study(pruner=named("halving"))
    config = {records.CONFIG: {"max_samples": 160}}

    def reached(value, state, **attrs):
        ended = {"state": state, "value": value if state == TrialState.COMPLETE else None}
        rung = {"intermediate_values": {1: value}, "system_attrs": {"completed_rung_0": value}}
        study.add_trial(create_trial(**ended, **rung, user_attrs=attrs))

    reached(0.50, TrialState.FAIL, **config)
    for value in (0.52, 0.54, 0.56, 0.58):
        reached(value, TrialState.COMPLETE, **config)
    trial = study.ask()
    trial.set_user_attr(records.CONFIG, config[records.CONFIG])
    trial.report(0.515, 1)
    reached(0.50, TrialState.WAITING, **{records.RESUMES: 0}, **(config if begun else {}))
    own = study.trials[trial.number]
    assert verdict(study, own, lambda: alike(study, own)) is None


def test_settled_compares_with_trials_on_the_same_samples():
    def trial(state, samples, value):
        return create_trial(
            state=state,
            value=value if state == TrialState.COMPLETE else None,
            intermediate_values={1: value},
            user_attrs={records.CONFIG: {"max_samples": samples}},
        )

    study = optuna.create_study()
    study.add_trial(trial(TrialState.COMPLETE, 1000, 0.2))
    paused = trial(TrialState.RUNNING, 160, 0.4)
    assert settled(study, paused, "why").state == "COMPLETE"
    study.add_trial(trial(TrialState.COMPLETE, 160, 0.3))
    assert settled(study, paused, "why").state == "PRUNED"


def test_halving_of_trials_one_after_the_other_is_optunas():
    rng = random.Random(0)
    curves = [[rng.uniform(1, 2) for _ in range(9)] for _ in range(30)]

    def lengths(pruner):
        study = optuna.create_study(pruner=pruner)
        found = []
        for curve in curves:
            trial = study.ask()
            for epoch, value in enumerate(curve, 1):
                trial.report(value, step=epoch)
                if pruner.prune(study, study.trials[trial.number]):
                    break
            found.append(epoch)
            study.tell(trial, state=TrialState.PRUNED)
        return found

    assert lengths(HalvingPruner()) == lengths(optuna.pruners.SuccessiveHalvingPruner(1, 3))


def test_a_plain_optuna_pruner_has_a_verdict_too():
    study = study_with()
    study.pruner = optuna.pruners.ThresholdPruner(upper=1.0)
    assert verdict(study, running([2.0])).reason == records.SUPERSEDED
    assert verdict(study, running([0.5])) is None


def test_settings_are_checked():
    for settings in ({"patience": 0}, {"min_delta": -0.1}, {"min_delta": NAN}, {"min_peers": 0}):
        with pytest.raises(ValueError, match="but got"):
            rule(**settings)
    for make in (named, check_name):
        with pytest.raises(StudyError, match=r"there is no pruner 'hyperbond'; did you mean 'hyperband'.*; known"):
            make("hyperbond")


def test_the_help_names_every_pruner_with_what_it_does():
    assert help_text().startswith("rising: ")
    assert all(f"{name}: {kind.about}" in help_text() and kind.about for name, kind in PRUNERS.items())


def test_settings_of_a_study_are_used():
    study = Study(name="s", description="", space={"lora_r": Int(2, 8)}, n_trials=1, patience=2, min_delta=0.5)
    assert pruner_for("rising", study).prune(study_with(), running([1.0, 0.9, 0.8]))
    defaults = replace(study, patience=Study.patience, min_delta=Study.min_delta)
    assert not pruner_for("rising", defaults).prune(study_with(), running([1.0, 0.9, 0.8]))


def test_best_value():
    assert best_value(create_trial(value=1.5, intermediate_values={1: 1.4})) == 1.5
    assert best_value(create_trial(state=TrialState.PRUNED, intermediate_values={1: NAN, 2: 1.4, 3: 1.5})) == 1.4
    assert best_value(create_trial(state=TrialState.PRUNED)) is None
