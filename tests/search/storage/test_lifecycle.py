"""The lives of trials: parked, lost, taken up again, counted, read back."""

import math
import time
from dataclasses import replace
from datetime import datetime, timedelta

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from search import records
from search.processes import this_process
from search.storage.database import close_storage, open_storage
from search.storage.lifecycle import counted, heartbeat, lineage, park, read_trials, requeue_lost
from search.storage.optuna_private import trial_id
from search.storage.studies import find_study, open_study
from tests.search.storage.databases import BY_HAND, STUDY, in_processes, reopen, suggest_all

GONE = {"host": "here", "pid": 1, "started_s": 0.0}


def started(study, epochs=2, **attrs):
    """A RUNNING trial that reported some epochs."""
    trial = study.ask()
    suggest_all(trial)
    for epoch in range(1, epochs + 1):
        trial.report(2.0 - 0.1 * epoch, step=epoch)
    for key, value in attrs.items():
        trial.set_user_attr(key, value)
    return trial


def test_a_parked_trial_goes_on_as_it_was(storage):
    study = open_study(storage, STUDY)
    trial = started(study, worker=this_process(), train_losses=[2.1, 2.0])
    park(study, trial)
    parked = reopen(storage).trials[0]
    assert parked.state == TrialState.WAITING
    assert parked.user_attrs[records.REASON] == records.INTERRUPTED
    assert counted(study) == 1

    study = reopen(storage)
    again = study.ask()
    assert again.number == trial.number
    assert suggest_all(again) == trial.params
    assert again.user_attrs["train_losses"] == [2.1, 2.0]
    assert study.trials[0].intermediate_values == {1: 1.9, 2: 1.8}
    assert again.user_attrs[records.WORKER] == this_process()  # of who had it, until another takes it
    assert requeue_lost(study) == ()
    again.report(1.5, step=3)
    study.tell(again, 1.5)
    assert study.trials[0].intermediate_values == {1: 1.9, 2: 1.8, 3: 1.5}
    assert study.trials[0].state == TrialState.COMPLETE
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        park(study, again)


def test_a_parked_trial_comes_before_what_is_queued(storage):
    study = open_study(storage, STUDY)
    trial = started(study)
    study.enqueue_trial({"learning_rate": 1e-4})
    park(study, trial)
    assert study.ask().number == trial.number


def test_a_trial_that_its_workers_die_of_is_taken_up_twice_at_most(storage):
    study = open_study(storage, replace(STUDY, enqueue=BY_HAND[:1]))
    trial = started(study, worker=GONE, train_losses=[2.1, 2.0], stage="rate", run_id="r", config={})
    params = trial.params
    for attempt in (1, 2):
        (lost,) = requeue_lost(study, is_alive=lambda worker: False, blamed={attempt - 1})
        assert (lost.number, lost.successor) == (attempt - 1, attempt)
        assert lost.detail == "process 1 on here is gone"
        assert study.trials[attempt - 1].user_attrs[records.DETAIL] == f"{lost.detail} (attempt {attempt})"
        failed, successor = study.trials[attempt - 1], study.trials[attempt]
        assert failed.state == TrialState.FAIL
        assert failed.user_attrs[records.REASON] == records.LOST
        assert successor.state == TrialState.WAITING
        assert successor.user_attrs == {
            records.LABEL: "1",
            records.OVERRIDES: {"max_samples": 20},
            records.STAGE: "rate",
            records.TRAIN_LOSSES: [2.1, 2.0],
            records.RESUMES: attempt - 1,
            records.ATTEMPT: attempt,
        }
        assert successor.intermediate_values == {1: 1.9, 2: 1.8}
        assert counted(study) == 1
        again = study.ask()
        assert again.number == attempt
        assert suggest_all(again) == params
        again.set_user_attr(records.WORKER, GONE)
    (lost,) = requeue_lost(study, is_alive=lambda worker: False, blamed={2})
    assert (lost.number, lost.successor) == (2, None)
    assert requeue_lost(study, is_alive=lambda worker: False) == ()
    assert [t.state for t in study.trials] == [TrialState.FAIL] * 3
    assert counted(study) == 1
    assert lineage(study, 2) == (2, 1, 0)
    reopen(storage, replace(STUDY, enqueue=BY_HAND[:1]))
    assert len(study.trials) == 3


def test_a_trial_that_dies_with_its_supervisor_group_or_host_has_used_no_attempt(storage):
    """kill -9 of everything every two minutes, epochs of three: the study ends with all its trials all the same."""
    study = open_study(storage, STUDY)
    started(study, epochs=0, worker=GONE)
    for death in range(12):
        blamed = {death} if death in (3, 7) else {death + 1}  # of another number: another worker's
        (lost,) = requeue_lost(study, is_alive=lambda worker: False, blamed=blamed)
        assert lost.successor == death + 1
        again = study.ask()
        assert again.number == lost.successor
        assert again.user_attrs[records.ATTEMPT] == (0 if death < 3 else 1 if death < 7 else 2)
        suggest_all(again)
        again.set_user_attr(records.WORKER, GONE)
    (lost,) = requeue_lost(study, is_alive=lambda worker: False, blamed={12})
    assert lost.successor is None
    assert counted(study) == 1


def test_an_epoch_further_is_a_new_first_attempt(storage):
    """On hosts that come and go, a long trial is lost more than three times, and must still come to its end."""
    study = open_study(storage, STUDY)
    started(study, worker=GONE)
    for epoch in range(3, 8):
        (lost,) = requeue_lost(study, is_alive=lambda worker: False, blamed={epoch - 3})
        again = study.ask()
        assert again.number == lost.successor
        assert again.user_attrs[records.ATTEMPT] == 1
        suggest_all(again)
        again.report(1.5, step=epoch)
        again.set_user_attr(records.WORKER, GONE)
    assert counted(study) == 1


def test_live_trials_are_left_alone(storage):
    study = open_study(storage, STUDY)
    trial = started(study, worker=this_process())
    assert requeue_lost(study) == ()
    make_silent(storage, study, trial)  # even if its heartbeats are late
    assert requeue_lost(study) == ()
    assert study.trials[0].state == TrialState.RUNNING


def make_silent(storage, study, trial, seconds=10_000):
    """Set a trial's start and last heartbeat back."""
    heartbeat(study, trial)
    with storage.engine.begin() as connection:
        for statement in (
            sqlalchemy.text("update trial_heartbeats set heartbeat = :past where trial_id = :id"),
            sqlalchemy.text("update trials set datetime_start = :past where trial_id = :id"),
        ):
            past = datetime.now() - timedelta(seconds=seconds)
            connection.execute(statement, {"past": past, "id": trial_id(trial)})


def test_a_trial_on_another_host_is_lost_once_it_is_silent(storage):
    study = open_study(storage, STUDY)
    trial = started(study, worker={"host": "far", "pid": 7, "started_s": 0.0})
    assert requeue_lost(study) == ()
    make_silent(storage, study, trial)
    heartbeat(study, trial)
    assert requeue_lost(study) == ()
    # SQLite's clock is UTC: ten thousand seconds and more of local time are past the grace period anywhere.
    make_silent(storage, study, trial, seconds=200_000)
    (lost,) = requeue_lost(study)
    assert lost.detail.startswith("process 7 on far has been silent for ")
    assert lost.detail.endswith(" s, more than 600 s")


def test_a_trial_whose_process_died_before_it_named_itself(storage):
    study = open_study(storage, STUDY)
    trial = started(study)
    assert requeue_lost(study) == ()
    with storage.engine.begin() as connection:
        past = datetime.now() - timedelta(seconds=601)
        connection.execute(sqlalchemy.text("update trials set datetime_start = :past"), {"past": past})
    (lost,) = requeue_lost(study)
    assert lost.number == trial.number


def test_a_trial_taken_up_again_is_not_judged_by_its_old_heartbeat(storage):
    study = open_study(storage, STUDY)
    trial = started(study)
    make_silent(storage, study, trial, seconds=200_000)
    park(study, trial)
    study.ask().set_user_attr(records.WORKER, {"host": "far", "pid": 7, "started_s": 0.0})
    assert requeue_lost(study) == ()


def test_a_successor_that_was_never_queued_is_made_up_for(storage, monkeypatch):
    study = open_study(storage, STUDY)
    started(study, worker=GONE)
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "add_trial", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            requeue_lost(study, is_alive=lambda worker: False)
    assert [t.state for t in study.trials] == [TrialState.FAIL]
    (lost,) = requeue_lost(study, is_alive=lambda worker: False)
    assert (lost.number, lost.successor) == (0, 1)
    assert requeue_lost(study, is_alive=lambda worker: False) == ()


def requeue_at_once(url, barrier, results):
    storage = open_storage(url)
    study = find_study(storage, "rsicap")
    barrier.wait(120)
    results.put(len(requeue_lost(study, is_alive=lambda worker: False)))
    close_storage(storage)


def test_two_supervisors_requeue_a_lost_trial_once(storage, url):
    study = open_study(storage, STUDY)
    for _ in range(5):
        started(study, epochs=0, worker=GONE)
    in_processes(requeue_at_once, 2, url)
    resumed = [t.user_attrs[records.RESUMES] for t in study.trials if records.RESUMES in t.user_attrs]
    assert sorted(resumed) == list(range(5))
    assert counted(study) == 5


def test_a_resumed_trial_may_set_its_constraints(storage):
    study = open_study(storage, STUDY)
    trial = started(study, worker=GONE)
    trial.set_constraint(records.NON_FINITE, 1.0)
    requeue_lost(study, is_alive=lambda worker: False)
    study.ask().set_constraint(records.NON_FINITE, 0.0)  # Optuna warns when it is set already
    assert read_trials(study)[1].violated == ()


def test_trials_read_back(storage):
    study = open_study(storage, STUDY)
    done = started(study, config={"lora_r": 8}, run_id="run", best_epoch=2, stopped_early=True, reason=records.RISING)
    study.tell(done, 1.8)
    pruned = study.ask()
    for epoch, value in enumerate([1.9, 1.5, math.nan, 1.7], 1):
        pruned.report(value, step=epoch)
    study.tell(pruned, state=TrialState.PRUNED)
    bad = study.ask()
    bad.set_constraint(records.NON_FINITE, 1.0)
    bad.set_constraint(records.OUT_OF_MEMORY, 0.0)
    study.tell(bad, state=TrialState.PRUNED)
    running = started(study)
    study.enqueue_trial({"learning_rate": 1e-4})

    one, two, three, four, five = read_trials(reopen(storage))
    assert (one.state, one.value, one.config, one.run_id) == ("COMPLETE", 1.8, {"lora_r": 8}, "run")
    assert (one.best_epoch, one.stopped_early, one.reason) == (2, True, records.RISING)
    assert one.params == done.params
    assert time.time() - 60 < one.start_s <= one.end_s <= time.time()
    assert (two.state, two.value) == ("PRUNED", 1.5)
    assert (three.value, three.violated) == (None, (records.NON_FINITE,))
    assert (four.state, four.value, four.end_s, four.number) == ("RUNNING", None, None, running.number)
    assert (five.state, five.start_s, five.params) == ("WAITING", None, {})


def test_every_way_to_end_counts_once(storage):
    study = open_study(storage, STUDY)
    study.tell(study.ask(), 1.0)
    study.tell(study.ask(), state=TrialState.PRUNED)
    study.tell(study.ask(), state=TrialState.FAIL)
    park(study, study.ask())
    assert counted(study) == 4
