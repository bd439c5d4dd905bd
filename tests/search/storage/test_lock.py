"""The lock among processes: files and numbers that those of earlier versions take, too."""

import contextlib

import filelock
import pytest
import sqlalchemy

from search.errors import StorageError, Unavailable
from search.storage import database
from search.storage.database import exclusive, open_storage
from search.storage.lock import locked
from search.tracking import address
from tests.search.storage.databases import new_database, postgres  # noqa: F401 - a fixture

NUMBERS = {"optuna": 7_305_515_412, "mlflow": -348025433035557501}
"""Of PostgreSQL's advisory locks, from the first version on."""


@contextlib.contextmanager
def another_process(url, number=NUMBERS["optuna"]):
    """Holds the lock as every version does."""
    url = sqlalchemy.make_url(url)
    if url.get_backend_name() == "sqlite":
        with filelock.FileLock(f"{url.database}.lock"):
            yield
        return
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_lock(number)))
        yield


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/a database.db"
    return new_database(request.getfixturevalue("postgres"))


def test_optunas_database_is_locked_as_ever(url, monkeypatch):
    storage = open_storage(url)
    monkeypatch.setattr(database, "WAIT_S", 0.2)
    with another_process(url), pytest.raises(StorageError, match=r"another process has held .* for 0.2 s; end it"):
        exclusive(storage).__enter__()
    with exclusive(storage):
        pass
    database.close_storage(storage)


def test_mlflows_database_is_locked_as_ever(url, monkeypatch):
    monkeypatch.setattr(address, "CREATE_S", 0.2)
    with another_process(url, NUMBERS["mlflow"]), pytest.raises(Unavailable, match="another process has held"):
        address.creating(url).__enter__()
    with address.creating(url):
        pass


def test_other_databases_have_a_file_elsewhere_or_none(tmp_path):
    url = sqlalchemy.make_url("mysql+pymysql://host/db")
    with locked(url, 1, wait_s=0.1):
        assert not list(tmp_path.iterdir())
    held = tmp_path / "held.lock"
    with locked(url, 1, wait_s=0.1, otherwise=held):
        assert held.exists()
        with pytest.raises(Unavailable, match=r"held\.lock"), locked(url, 1, wait_s=0.1, otherwise=held):
            raise AssertionError("two had the lock")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    url = sqlalchemy.make_url(f"sqlite:///{tmp_path}/no/folder.db")
    (tmp_path / "no").write_text("a file in its place")
    refused = pytest.raises(StorageError, match=r"cannot write '.*no/folder.db.lock': ")
    with refused, locked(url, 1, wait_s=1):
        raise AssertionError("locked")
