"""One process at a time: a lock beside a SQLite file, an advisory lock in PostgreSQL.

A process that dies gives its lock up: the system unlocks its files, the server ends its connection. The names of lock
files and the numbers of advisory locks must stay as they are, since processes of an earlier version may hold them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import sqlalchemy
from sqlalchemy.engine import URL

from search.errors import StorageError, Unavailable
from search.urls import shown
from trainer.common.errors import shown as shown_text

CONNECT_TIMEOUT_S = 10
"""Longest wait for a database server to answer."""
_LOCK_TIMEOUT = "55P03"
"""PostgreSQL's code of a lock that was not to be had within `lock_timeout`: lock_not_available."""


@contextmanager
def locked(url: URL, key: int, *, wait_s: float, otherwise: Path | None = None) -> Iterator[None]:
    """Hold the lock of a database among this program's processes; not reentrant.

    It holds between hosts on PostgreSQL, and on SQLite where the file system has locks.

    Args:
        url: The database. On SQLite the lock is the file `<database>.lock`.
        key: The number of the advisory lock on PostgreSQL, within the database.
        wait_s: Longest wait for a process that holds it.
        otherwise: The lock's file for other databases; None for no lock.

    Raises:
        Unavailable: another process held it for `wait_s` seconds.
        StorageError: the lock's file cannot be written.
        sqlalchemy.exc.SQLAlchemyError: the server does not answer, or refuses.
    """
    match url.get_backend_name():
        case "postgresql":
            with _advisory_lock(url, key, wait_s):
                yield
        case "sqlite" if url.database:
            with _file_lock(url, Path(f"{url.database}.lock"), wait_s):
                yield
        case _ if otherwise is not None:
            with _file_lock(url, otherwise, wait_s):
                yield
        case _:
            yield


def connect_arguments(url: URL) -> dict[str, Any]:
    """The driver's arguments for a connection to PostgreSQL: its timeout, unless the URL has one."""
    limited = url.get_backend_name() != "postgresql" or "connect_timeout" in url.query
    return {} if limited else {"connect_timeout": CONNECT_TIMEOUT_S}


@contextmanager
def _file_lock(url: URL, path: Path, wait_s: float) -> Iterator[None]:
    lock = filelock.FileLock(path, timeout=wait_s)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise _held(url, shown_text(str(path)), wait_s) from None
    except OSError as error:
        raise StorageError(f"{shown(url)}: cannot write {shown_text(str(path))}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _advisory_lock(url: URL, key: int, wait_s: float) -> Iterator[None]:
    # AUTOCOMMIT: a transaction open for as long as the lock is held would keep the server from cleaning up.
    engine = sqlalchemy.create_engine(
        url, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT", connect_args=connect_arguments(url)
    )
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(engine.connect())
        connection.exec_driver_sql(f"SET lock_timeout = '{wait_s:g}s'")
        try:
            connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_lock(key)))
        except sqlalchemy.exc.DBAPIError as error:
            if _LOCK_TIMEOUT not in (getattr(error.orig, name, None) for name in ("sqlstate", "pgcode")):
                raise
            raise _held(url, "the lock of this database", wait_s) from None
        yield  # closing the connection gives the lock up


def _held(url: URL, lock: str, wait_s: float) -> Unavailable:
    return Unavailable(f"{shown(url)}: another process has held {lock} for {wait_s:g} s; end it and try again")
