"""Opening a database, SQLite and PostgreSQL alike: at once, locked, damaged, somebody else's."""

import os
import sqlite3
from dataclasses import replace

import pytest
import sqlalchemy
from optuna.trial import TrialState

from search import records
from search.errors import StorageError
from search.storage import database
from search.storage.database import close_storage, exclusive, open_storage
from search.storage.lifecycle import heartbeat
from search.storage.studies import find_study, open_study
from tests.search.storage.databases import BY_HAND, STUDY, in_processes, new_database


def open_at_once(url, barrier, results):
    try:
        barrier.wait(120)
        storage = open_storage(url)
        study = open_study(storage, replace(STUDY, enqueue=BY_HAND))
        results.put(study.study_name)
        close_storage(storage)
    except Exception as error:  # noqa: BLE001 - reported to the test
        results.put(repr(error))


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


def test_a_limit_that_is_no_time_is_refused(tmp_path):
    with pytest.raises(StorageError, match="grace_period"):
        open_storage(f"sqlite:///{tmp_path}/optuna.db", grace_s=0)


# What cannot be opened


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("runs/optuna.db", "is not a database URL; .*; for a file, sqlite:///runs/optuna.db"),
        ("", "is not a database URL"),
        ("oracel://host/db", "'oracel' is not a known database dialect"),
        ("postgresql+psycopg://u:secret@host:port/db", "is not a database URL"),
        ("sqlite://", "in memory cannot be shared"),
        ("sqlite:///:memory:", "in memory cannot be shared"),
        ("sqlite:////no/such/folder/optuna.db", "the folder '/no/such/folder' does not exist"),
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
    with pytest.raises(StorageError, match="is not a SQLite database"):
        open_storage(f"sqlite:///{tmp_path}/notes.txt")
    (tmp_path / "damaged.db").write_bytes(b"SQLite format 3\x00" + bytes(range(256)) * 40)
    with pytest.raises(StorageError, match=r"not a SQLite database|damaged"):
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
    with pytest.raises(StorageError, match=r"another program's database \(tables alembic_version, experiments") as e:
        open_storage(url)
    assert "known to work" not in str(e.value)
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
    with pytest.raises(StorageError, match="requires a password"):
        open_storage(uri.replace("postgres:@", "locked@"))


def test_a_user_without_rights_and_one_who_does_not_exist(postgres):
    postgres.psql("CREATE ROLE guest LOGIN")
    uri = postgres.get_uri(database="postgres", driver="psycopg")
    with pytest.raises(StorageError, match="user 'guest' may not create tables"):
        open_storage(uri.replace("postgres:@", "guest@"))
    with pytest.raises(StorageError, match="does not admit user 'nobody'"):
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
