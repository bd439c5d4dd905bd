"""What an MLflow tracking URI may be: checks before the store is opened, and the messages when it cannot be.

MLflow retries a database that it cannot open for 100 s; these checks answer in seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import tempfile
import urllib.parse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from search.errors import StorageError, Unavailable
from search.storage.lock import locked
from search.tracking.mlflow_private import EXPERIMENTS, OTHER_SCHEMA
from search.urls import first_line, masked_in, shown, without_secrets
from trainer.common.errors import shown as quoted

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
CONNECT_S = 10
"""Longest wait for a database to answer."""
CREATE_S = 300
"""Longest wait for another process that creates the tables."""
CREATE_KEY = int.from_bytes(hashlib.sha256(b"lora-search mlflow schema").digest()[:8], "big", signed=True)
"""Of the advisory lock that it holds on PostgreSQL meanwhile."""


def check(uri: str) -> None:
    """Refuse what cannot work.

    Raises:
        Unavailable: nothing answers there now.
        StorageError: not a kind of store that is supported, or not an MLflow store.
    """
    scheme = uri.partition("://")[0].partition("+")[0].lower() if "://" in uri else uri.partition(":")[0]
    if any("\ud800" <= character <= "\udfff" for character in uri):
        raise StorageError(f"--tracking-uri {quoted(shown(uri))} is not UTF-8 text; name another address")
    if scheme in ("http", "https"):
        _check_server(uri)
    elif scheme in DATABASES and "://" in uri:
        _check_database(uri)
    elif "://" not in uri or scheme == "file":
        raise StorageError(
            f"--tracking-uri {quoted(shown(uri))} is a folder or file; MLflow no longer takes folders (since 3.13), "
            f"and a database is written as a URL, for example sqlite:///runs/mlflow.db"
        )
    else:
        raise StorageError(
            f"--tracking-uri {shown(uri)}: {quoted(scheme)} is not supported; use a database ({', '.join(DATABASES)}) "
            f"or the http(s):// address of an MLflow server"
        )


def _check_server(uri: str) -> None:
    """Read the address. Whether somebody answers there only MLflow's own client can tell: it has its own settings of
    certificates, tokens and proxies."""
    try:
        url = sa.make_url(uri)
        port = urllib.parse.urlsplit(uri).port or 80  # as requests reads it, which raises its errors as they are
    except (sa.exc.ArgumentError, ValueError) as error:
        raise StorageError(f"--tracking-uri {quoted(shown(uri))} is not an address: {first_line(error)}") from None
    if not url.host or not 0 < port < 65_536:
        raise StorageError(f"--tracking-uri {quoted(shown(uri))} is not an address: no host, or no such port")


def unreachable(uri: str, error: Exception) -> StorageError:
    """Why MLflow's client does not get through to a server: `Unavailable` if it may later."""
    causes = list(_causes(error))
    first = causes[-1]
    if any(isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME for cause in causes):
        return StorageError(f"no MLflow server answers at {shown(uri)}: {first}; is the name right?")
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return StorageError(
            f"the certificate of {shown(uri)} is not trusted: {first}; name its authority's with "
            "MLFLOW_TRACKING_SERVER_CERT_PATH"
        )
    return Unavailable(f"no MLflow server answers at {shown(uri)}: {masked_in(first_line(first))}; is it running?")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from: MLflow, requests and urllib3 wrap errors each in its own way."""
    seen: list[BaseException] = []
    left: list[Any] = [error]
    while left:
        found = left.pop(0)
        if isinstance(found, BaseException) and found not in seen:
            seen.append(found)
            yield found
            left += [found.__cause__, found.__context__, getattr(found, "reason", None), *found.args]


def _check_database(uri: str) -> None:
    """Connect once, and see whose tables are there."""
    try:
        url = sa.make_url(uri)
        if url.get_backend_name() == "sqlite" and url.database:
            if url.database.endswith("/"):
                raise StorageError(f"the tracking database {shown(uri)} is a folder; name a file in it")
            Path(url.database).absolute().parent.mkdir(parents=True, exist_ok=True)
        networked = url.get_backend_name() in ("postgresql", "mysql")
        with warnings.catch_warnings():
            warnings.simplefilter("error", sa.exc.SAWarning)  # it would go on without an option it does not know
            engine = sa.create_engine(url, connect_args={"connect_timeout": CONNECT_S} if networked else {})
    except StorageError:  # which is a ValueError too
        raise
    except (sa.exc.ArgumentError, sa.exc.SAWarning, ImportError, OSError, TypeError, ValueError) as error:
        raise StorageError(f"the tracking database {shown(uri)} cannot be opened: {first_line(error)}") from error
    try:
        with engine.connect() as connection:
            tables = set(sa.inspect(connection).get_table_names())
            if url.get_backend_name() == "sqlite":
                _write_ahead(uri, connection)
    except (sa.exc.SQLAlchemyError, TypeError, ValueError) as error:  # the last two of an option in the query
        cause = getattr(error, "orig", None) or error
        signs = ("locked", "refused", "timeout expired", "starting up", "shutting down", "closed the connection")
        kind = Unavailable if any(sign in str(cause) for sign in signs) else StorageError
        said = without_secrets(first_line(cause), url)
        raise kind(f"the tracking database {shown(uri)} cannot be opened: {said}") from error
    finally:
        engine.dispose()
    if "studies" in tables and EXPERIMENTS.name not in tables:
        raise StorageError(
            f"{shown(uri)} is Optuna's database; MLflow needs one of its own (both keep their "
            f"schema version in a table named alembic_version)"
        )


def _write_ahead(uri: str, connection: sa.Connection) -> None:
    """Let a dashboard that reads not hold up the workers' writes. The file keeps this.

    Of two processes that switch a file over at once SQLite refuses one as "locked" without waiting, whatever the
    timeout: https://www.sqlite.org/wal.html#sometimes_queries_return_sqlite_busy_in_wal_mode
    """

    def kept() -> bool:
        return connection.exec_driver_sql("PRAGMA journal_mode").scalar() in ("wal", "memory")

    if not kept():
        with creating(uri):
            if not kept():
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")


@contextlib.contextmanager
def creating(uri: str) -> Iterator[None]:
    """Let one process at a time open the store: whichever comes first creates its tables, the others find them.

    MLflow itself does not guard against this: of 16 processes on a fresh SQLite database 15 crash.
    """
    if uri.startswith("http"):
        yield
        return
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    beside_none = Path(tempfile.gettempdir()) / f"lora-search-{name}.lock"
    with locked(sa.make_url(uri), CREATE_KEY, wait_s=CREATE_S, otherwise=beside_none):
        yield


def explain(uri: str, error: Exception) -> str:
    """Why MLflow refused a store that `check` had let pass, and the way out."""
    text = first_line(error)
    if "already exists" in text or "duplicate column" in text:
        return (
            f"the tracking database {shown(uri)} has only some of MLflow's tables, as if MLflow was killed while it "
            "made them; name another database, or delete this one if nothing is in it"
        )
    if OTHER_SCHEMA in text:
        return (
            f"the tracking database {shown(uri)} was made by another version of MLflow; after a backup run "
            f"`mlflow db upgrade {shown(uri)}`"
        )
    return f"MLflow cannot use {shown(uri)}: {text}"
