"""The clock of a host is set: live processes stay alive, lost trials are found."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import sqlalchemy

from search import records
from search.processes import alive, this_process
from search.storage import lifecycle, optuna_private
from search.storage.database import close_storage, open_storage
from search.storage.lifecycle import heartbeat, requeue_lost
from search.storage.retry import RetryingStorage

FAR = {"host": "far", "pid": 7, "started_s": 0.0}


@pytest.fixture
def study(tmp_path: Path) -> Any:
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db", grace_s=600)
    yield optuna.create_study(storage=storage, study_name="clock")
    close_storage(storage)


@pytest.mark.parametrize("moved_s", [-3600.0, 3600.0])
def test_a_clock_that_is_set_kills_no_process(monkeypatch: pytest.MonkeyPatch, moved_s: float) -> None:
    """psutil derives start times from the boot's time of day, which Linux moves along with the clock."""
    me = this_process()
    before = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: before(self) + moved_s)
    assert alive(me) is True
    assert alive({**me, "since_boot": me["since_boot"].partition(":")[0] + ":1"}) is False
    assert alive({**me, "pid": 1}) is False, "the process id of another"


def test_a_trial_that_began_in_the_future_is_lost_all_the_same(study: optuna.Study) -> None:
    """Its host's clock was an hour ahead and was then set back, or the host is gone."""
    trial = study.ask()
    trial.set_user_attr(records.WORKER, FAR)
    heartbeat(study, trial)
    _set(study, "update trials set datetime_start = :when", timedelta(hours=1))
    assert requeue_lost(study) == ()
    _set(study, "update trial_heartbeats set heartbeat = :when", timedelta(days=-2))
    assert [lost.number for lost in requeue_lost(study)] == [0]


def test_a_worker_says_how_long_it_may_be_silent(study: optuna.Study) -> None:
    for limit_s in (100_000_000.0, 100.0):
        trial = study.ask()
        trial.set_user_attr(records.WORKER, {**FAR, lifecycle.LOST_AFTER: limit_s})
        heartbeat(study, trial)
    for table, column in (("trials", "datetime_start"), ("trial_heartbeats", "heartbeat")):
        _set(study, f"update {table} set {column} = :when", timedelta(days=-2))
    assert [lost.number for lost in requeue_lost(study)] == [1]


def _set(study: optuna.Study, statement: str, offset: timedelta) -> None:
    storage = optuna_private.backend(study)
    assert isinstance(storage, RetryingStorage)
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text(statement), {"when": datetime.now() + offset})
