"""Optuna's database restarted, cut off, locked: calls are done again, each once, and a stop is one that resumes."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from search import records
from search.errors import DatabaseAway, StorageError
from search.planning.budget import Budget
from search.processes import this_process
from search.space import Float
from search.storage import database, retry
from search.storage.database import close_storage, open_storage, reopen_storage
from search.storage.queue import LongestFirst
from search.storage.retry import RetryingStorage
from search.storage.studies import open_study
from search.study import Study
from search.workers.trial_source import TrialSource
from tests.faults.postgres import Postgres
from trainer.common.disk import out_of_room

STUDY = Study(name="faults", description="", space={"learning_rate": Float(1e-6, 1e-3, log=True)}, n_trials=12)
EPOCHS = 3


@pytest.fixture(scope="module")
def postgres(open_folder: Callable[[], Path]) -> Iterator[Postgres]:
    server = Postgres(open_folder())
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/optuna.db"
    found: str = request.getfixturevalue("postgres").new_database()
    return found


@pytest.fixture
def opened() -> Iterator[Callable[[str], RetryingStorage]]:
    storages: list[RetryingStorage] = []

    def open_(url: str) -> RetryingStorage:
        storages.append(open_storage(url))
        return storages[-1]

    yield open_
    for storage in storages:
        close_storage(storage)


def run_trials(
    storage: RetryingStorage, study: optuna.Study, pause_s: float = 0.0, after_step: Callable[[], object] = object
) -> None:
    """What a worker does with its trials, but the training."""
    job: Any = SimpleNamespace(budget=Budget(12), study=STUDY, confirm=None)
    mine = LongestFirst(study.study_name, storage, study.sampler, study.pruner, STUDY, 40)
    source = TrialSource(mine, storage, job, this_process())
    while (trial := source.ask()) is not None:
        after_step()
        trial.set_user_attr(records.CONFIG, {"learning_rate": trial.params["learning_rate"]})
        for epoch in range(1, EPOCHS + 1):
            trial.report(loss(trial.number, epoch), epoch)
            trial.set_user_attr(records.TRAIN_LOSSES, [1.0] * epoch)
            after_step()
            time.sleep(pause_s)
        mine.tell(trial, loss(trial.number, EPOCHS))


def loss(number: int, epoch: int) -> float:
    return 1 / (1 + number) + 1 / epoch


def check(study: optuna.Study) -> None:
    """Twelve trials, each told once, nothing reported missing, nobody left behind."""
    trials = study.get_trials()
    assert [t.number for t in trials] == list(range(12))
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    for trial in trials:
        assert trial.intermediate_values == {e: loss(trial.number, e) for e in range(1, EPOCHS + 1)}
        assert trial.value == loss(trial.number, EPOCHS) and len(trial.user_attrs[records.TRAIN_LOSSES]) == EPOCHS
        assert trial.params.keys() == {"learning_rate"}


@pytest.mark.parametrize("url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.slow)])
def test_commits_that_fail_at_random_before_or_after_they_are_done(
    seed: int, url: str, opened: Callable[[str], RetryingStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = opened(url)
    study = open_study(storage, STUDY)
    chance = random.Random(seed)
    real = Session.commit
    failures = 0

    def commit(session: Session) -> None:
        nonlocal failures
        how = chance.choice(("before", "after", *[""] * 8))
        if how != "before":
            real(session)
        if how:
            failures += 1
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))

    monkeypatch.setattr(Session, "commit", commit)
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)  # Optuna's own pauses too
    run_trials(storage, study)
    monkeypatch.undo()
    check(study)
    assert failures > 20


@pytest.mark.long
def test_connections_cut(postgres: Postgres, opened: Callable[[str], RetryingStorage]) -> None:
    """Once after each step, at any moment: by the clock, a machine too slow for a step would be cut off for ever."""
    storage = opened(postgres.new_database())
    study = open_study(storage, STUDY)
    steps, done = threading.Semaphore(0), threading.Event()

    def cut() -> int:
        chance, cuts = random.Random(0), 0
        while not done.wait(chance.uniform(0, 0.05)):
            if steps.acquire(timeout=1):
                cuts += 1
                postgres.cut()
        return cuts

    with ThreadPoolExecutor(1) as cutter:
        cuts = cutter.submit(cut)
        try:
            run_trials(storage, study, after_step=steps.release)
        finally:
            done.set()
    check(study)
    assert cuts.result() > 5


@pytest.mark.slow
def test_the_server_is_restarted(postgres: Postgres, opened: Callable[[str], RetryingStorage]) -> None:
    storage = opened(postgres.new_database())
    study = open_study(storage, STUDY)
    said: list[str] = []
    storage.say = said.append

    def restart() -> None:
        for pause_s in (
            9.0,
            0.2,
        ):  # tried after 2.8 s, too early to say so, and by 6 s again
            time.sleep(0.3)
            postgres.stop()
            time.sleep(pause_s)
            postgres.start()

    restarter = threading.Thread(target=restart)
    restarter.start()
    try:
        run_trials(storage, study, pause_s=0.15)
    finally:
        restarter.join()
    check(study)
    assert len(said) == 2 and "the database does not answer" in said[0] and "answers again" in said[1]


def test_a_server_that_stays_away_stops_the_search_and_a_worker_waits_for_one_that_comes(
    postgres: Postgres, opened: Callable[[str], RetryingStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.new_database()
    storage = opened(url)
    study = open_study(storage, STUDY)
    trial = study.ask()
    postgres.stop()
    monkeypatch.setattr(retry, "RETRY_S", 1.0)
    began = time.monotonic()
    try:
        with pytest.raises(DatabaseAway, match="same command goes on from the last checkpoints") as away:
            trial.report(1.0, 1)
        assert time.monotonic() - began < 5 and away.value.exit_code == 75
        monkeypatch.setattr(retry, "RETRY_S", 30.0)
        starter = threading.Timer(1.0, postgres.start)
        starter.start()
        close_storage(reopen_storage(url))
        starter.join()
    except BaseException:
        with contextlib.suppress(Exception):
            postgres.start()
        raise
    trial.report(1.0, 1)
    assert study.get_trials()[0].intermediate_values == {1: 1.0}


def test_a_locked_file_is_waited_for_then_given_up(
    tmp_path: Path, opened: Callable[[str], RetryingStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.1)
    storage = opened(f"sqlite:///{tmp_path}/optuna.db")
    study = open_study(storage, STUDY)
    trial = study.ask()
    other = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(retry, "RETRY_S", 0.5)
    with pytest.raises(DatabaseAway, match="database is locked"):
        trial.report(1.0, 1)
    monkeypatch.setattr(retry, "RETRY_S", 30.0)
    release = threading.Timer(1.0, lambda: other.execute("ROLLBACK"))
    release.start()
    trial.report(1.0, 1)
    release.join()
    other.close()
    assert study.get_trials()[0].intermediate_values == {1: 1.0}


def test_what_trying_again_does_not_mend_is_not_tried_again(
    tmp_path: Path, opened: Callable[[str], RetryingStorage]
) -> None:
    storage = opened(f"sqlite:///{tmp_path}/optuna.db")
    study = open_study(storage, STUDY)
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP TABLE trial_user_attributes"))
    began = time.monotonic()
    with pytest.raises((optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError)):
        study.ask().set_user_attr("x", 1)
    assert time.monotonic() - began < 15
    with pytest.raises(StorageError, match="is not a SQLite database"):
        (tmp_path / "notes.txt").write_text("not a database, but long enough for a header")
        reopen_storage(f"sqlite:///{tmp_path}/notes.txt")


def test_a_full_disk_is_not_waited_for(tmp_path: Path, opened: Callable[[str], RetryingStorage]) -> None:
    storage = opened(f"sqlite:///{tmp_path}/optuna.db")
    study = open_study(storage, STUDY)
    trial = study.ask()
    with storage.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()

    def grown(connection: Any, _record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}").close()

    sqlalchemy.event.listen(storage.engine, "connect", grown)
    storage.engine.dispose()
    began = time.monotonic()
    with pytest.raises((optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError)) as full:
        for number in range(100):
            trial.set_user_attr(f"note {number}", "x" * 2_000)
    assert out_of_room(full.value) and time.monotonic() - began < 15


@pytest.mark.parametrize("text", ["soon", "", "-1", "inf", "nan"])
def test_a_wait_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(StorageError, match="LORA_SEARCH_DATABASE_WAIT_S must be a number of seconds"):
        retry._wait_s(text)
