"""Opening Optuna's database: the URL, connections, the schema, and a clear message for each failure.

SQLite and PostgreSQL then behave alike:

    schema        created by one process while the others wait (sixteen workers on a fresh SQLite file would
                  otherwise crash in Optuna's schema creation)
    transactions  on SQLite they take the write lock when they begin, as SELECT ... FOR UPDATE does on PostgreSQL,
                  so that no two workers can take the same waiting trial
    clock         heartbeats are written and judged by the database's clock, never by a host's
    absence       calls are retried while the database is away or locked, see `search.storage.retry`
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SAWarning, SQLAlchemyError

from search.errors import StorageError
from search.storage.lock import connect_arguments, locked
from search.storage.retry import RetryingStorage, is_away, retrying
from search.urls import first_line, shown, without_secrets
from trainer.common.errors import MOST_SHOWN
from trainer.common.errors import shown as shown_text

log = logging.getLogger("search.storage.database")

WAIT_S = 60
"""Longest wait for another process's lock."""
BUSY_S = 10
"""Longest wait of one call for another process's lock on a SQLite file; calls are retried."""

_EXAMPLES = "sqlite:///runs/optuna.db or postgresql+psycopg://user:password@host/database"
_PG_LOCK = 7_305_515_412
"""Number of the advisory lock on PostgreSQL: arbitrary, but the same for all processes and versions."""
_known_head: str | None = None


def open_storage(url: str, *, grace_s: int | None = None) -> RetryingStorage:
    """Optuna's storage at an SQLAlchemy URL, its schema created if the database is empty.

    Optuna's own heartbeat stays off: it works inside `Study.optimize` only and warns at every `ask`. Our worker
    records heartbeats (`heartbeat` in search.storage.lifecycle), and `requeue_lost` judges them by `grace_period`.

    Args:
        url: `sqlite:///FILE` or `postgresql+psycopg://...`; `postgresql://` and `postgres://` mean psycopg as well.
        grace_s: Seconds without a heartbeat after which `requeue_lost` takes a trial for lost whose worker has not
            stated a limit of its own; None for never, which suits whoever only reads.

    Raises:
        StorageError: the URL makes no sense, or the database cannot be opened, reached or shared.
    """
    # What can be refused without connecting.
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        _check_file(parsed)
    # Connect, and create the schema or check it, one process at a time.
    with contextlib.ExitStack() as undo:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", SAWarning)  # an unknown option would only be warned of
                engine = sqlalchemy.create_engine(parsed, **_engine_options(parsed))
            undo.callback(engine.dispose)  # a constructor that fails would leave its connections open
            with locked(parsed, _PG_LOCK, wait_s=WAIT_S):
                _refuse_foreign(parsed, engine)
                storage = RetryingStorage(
                    # Optuna fills {SCHEMA_VERSION} into URLs, so braces, e.g. of a password, are doubled.
                    parsed.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),
                    engine_kwargs={"pool": engine.pool},
                    grace_period=grace_s,
                    skip_compatibility_check=True,  # done here, in our words
                )
                undo.callback(storage.remove_session)  # returns its connection, before the engine closes all of them
                _check_schema(parsed, storage)
        except StorageError:  # which is a ValueError too
            raise
        except SQLAlchemyError as error:
            raise _explained(parsed, error) from None
        except (TypeError, ValueError, SAWarning) as error:  # the driver's, of an option in the URL's query
            raise StorageError(
                f"{_cut(parsed)}: the database cannot be opened: {first_line(error)}; known to work: {_EXAMPLES}"
            ) from None
        except ImportError as error:
            raise StorageError(
                f"{shown(parsed)} needs the driver {error.name!r}, which is not installed; known to work: {_EXAMPLES}"
            ) from None
        undo.pop_all()
    # From here on, transactions exclude each other.
    if parsed.get_backend_name() == "sqlite":
        _lock_at_begin(storage.engine)
    return storage


def open_existing(url: str, to_come: Path | None = None) -> RetryingStorage | None:
    """Like `open_storage`, for whoever only reads: None where no study has been stored yet. Nothing is created.

    Args:
        url: as `open_storage` takes it.
        to_come: A folder that a search creates; a file in it need not be there.

    Raises:
        StorageError: as `open_storage`.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        file = _file(parsed)
        if to_come is not None and file.parent == to_come and not to_come.exists():
            return None
        _check_file(parsed)
        if not file.is_file():
            return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)
            engine = sqlalchemy.create_engine(parsed, **_engine_options(parsed))
        try:
            if not sqlalchemy.inspect(engine).has_table("studies"):
                return None
        finally:
            engine.dispose()
    except (SQLAlchemyError, TypeError, ValueError, ImportError):
        pass  # `open_storage` says what is wrong
    return open_storage(url)


def reopen_storage(url: str, *, grace_s: int | None = None) -> RetryingStorage:
    """Open a database that was there a moment ago: as `open_storage`, but retried as calls are.

    Raises:
        StorageError: as `open_storage`.
        DatabaseAway: the database does not come back.
    """

    def open_or_raise() -> RetryingStorage:
        try:
            return open_storage(url, grace_s=grace_s)
        except StorageError as error:
            cause = error.__context__
            if isinstance(cause, SQLAlchemyError) and is_away(cause):
                raise cause from None
            raise

    return retrying(_parse(url), open_or_raise, log.warning)


def close_storage(storage: RDBStorage) -> None:
    """Close the connections of this process."""
    storage.remove_session()
    storage.engine.dispose()


@contextmanager
def exclusive(storage: RetryingStorage) -> Iterator[None]:
    """Hold the lock of the database, see `search.storage.lock`: several of Optuna's transactions become one step.

    It is not reentrant, and Optuna's own transactions in other processes do not wait for it.

    Raises:
        StorageError: another process held it for `WAIT_S` seconds.
        DatabaseAway: the database does not answer.
    """
    url = storage.engine.url
    with contextlib.ExitStack() as held:
        try:
            storage.retrying(lambda: held.enter_context(locked(url, _PG_LOCK, wait_s=WAIT_S)))
        except SQLAlchemyError as error:
            if is_away(error):  # within a larger step, which is retried as a whole
                raise
            raise _explained(url, error) from None
        yield


def _cut(url: URL) -> str:
    return shown_text(shown(url))


def _parse(url: str) -> URL:
    scheme = url.partition(":")[0]
    if any("\ud800" <= character <= "\udfff" for character in url):
        raise StorageError(f"{shown_text(shown(url))}: the URL is not UTF-8 text; use {_EXAMPLES}")
    if scheme.startswith(("journal", "redis")) or url.endswith((".log", ".journal")):
        raise StorageError(
            f"{shown_text(shown(url))}: Optuna's journal storages keep no heartbeats, so lost trials could not be "
            f"found; use {_EXAMPLES}"
        )
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        parsed.get_dialect()
    except NoSuchModuleError:
        raise StorageError(
            f"{shown_text(shown(url))}: {shown_text(scheme)} is not a known database dialect; use {_EXAMPLES}"
        ) from None
    except (ArgumentError, ValueError):  # ValueError: a port that is not a number
        hint = (
            f"; for a file, sqlite:///{url}"
            if 0 < len(url) < MOST_SHOWN and "://" not in url and "@" not in url
            else ""
        )
        raise StorageError(
            f"{shown_text(shown(url))} is not a database URL; expected e.g. {_EXAMPLES}{hint}"
        ) from None
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StorageError(f"{shown(parsed)}: a database in memory cannot be shared by workers; use {_EXAMPLES}")
    return parsed


def _check_file(url: URL) -> None:
    """Refuse the file of a SQLite database for what can be seen without opening it as one."""
    path = _file(url)
    try:
        path.exists()
    except (OSError, ValueError) as error:  # a name too long
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise StorageError(f"{_cut(url)}: the file cannot be opened: {reason}; use {_EXAMPLES}") from None
    if str(path).startswith("file:"):
        raise StorageError(f"{shown(url)}: give the file as a plain path, sqlite:///FOLDER/FILE")
    if not path.parent.is_dir():
        raise StorageError(f"{shown(url)}: the folder {str(path.parent)!r} does not exist; create it, or name another")
    # A Path leaves the last slash out, and the lock beside the file would be made in a folder of its name.
    if path.is_dir() or str(url.database).endswith("/"):
        raise StorageError(f"{shown(url)}: {str(path)!r} is a folder; name a file in it")
    if not path.exists():
        return
    if not os.access(path, os.R_OK):
        raise StorageError(f"{shown(url)}: the file cannot be read: {os.strerror(errno.EACCES)}")
    # Asked through SQLite: to open and close the file ourselves would release the locks of all connections that this
    # process has to it (https://www.sqlite.org/howtocorrupt.html, 2.2), and another's last writes would be lost.
    with contextlib.closing(sqlite3.connect(path, timeout=0)) as connection:
        try:
            connection.execute("PRAGMA schema_version")
        except sqlite3.OperationalError:  # locked, or without the right to write: whoever opens it says so
            pass
        except sqlite3.DatabaseError:
            raise StorageError(f"{shown(url)}: {str(path)!r} is not a SQLite database; name another file") from None


def _file(url: URL) -> Path:
    assert url.database is not None
    return Path(url.database)


def _engine_options(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": WAIT_S}}
    # Trials last longer than servers and their proxies keep an idle connection: look before using one.
    return {"pool_pre_ping": True, "connect_args": connect_arguments(url)}


def _refuse_foreign(url: URL, engine: Engine) -> None:
    """Refuse MLflow's database: both keep their schema's version in `alembic_version`, and would break each other."""
    with engine.connect() as connection:
        tables = set(sqlalchemy.inspect(connection).get_table_names())
        if "alembic_version" in tables and "version_info" not in tables:
            raise StorageError(
                f"{shown(url)} is another program's database (tables {', '.join(sorted(tables)[:4])}, ...); "
                "Optuna needs its own, apart from MLflow's"
            )
        if url.get_backend_name() == "sqlite":
            # Readers then do not block the writer. The file keeps this; without shared memory, as on network file
            # systems, SQLite stays with its rollback journal.
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")


def _check_schema(url: URL, storage: RDBStorage) -> None:
    """Refuse a database made by an Optuna with another schema."""
    current, head = storage.get_current_version(), _head(storage)
    if current == head:
        return
    known = current in storage.get_all_versions()
    remedy = "run `optuna storage upgrade --storage URL`" if known else "install a newer Optuna"
    raise StorageError(f"{shown(url)}: the database's schema is {current}, this Optuna needs {head}; {remedy}")


def _head(storage: RDBStorage) -> str:
    """The schema of the installed Optuna, read once: 24 of the 35 ms that opening a database takes."""
    global _known_head
    if _known_head is None:
        _known_head = storage.get_head_version()
    return _known_head


def _lock_at_begin(engine: Engine) -> None:
    """Make each transaction on SQLite take the write lock when it begins.

    Python's sqlite3 begins a transaction only at its first write. Two workers could then both read that a trial
    waits before either marks it as running. https://docs.sqlalchemy.org/20/dialects/sqlite.html describes the remedy.
    """

    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        # In WAL mode a power cut may cost the last commits with NORMAL, never the database; a crash costs nothing.
        connection.execute("PRAGMA synchronous=NORMAL").close()
        connection.execute(f"PRAGMA busy_timeout={1000 * min(BUSY_S, WAIT_S):.0f}").close()

    def begun(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", connected)
    sqlalchemy.event.listen(engine, "begin", begun)
    engine.dispose()  # earlier connections have neither


def _explained(url: URL, error: SQLAlchemyError) -> StorageError:
    """A driver's error in the user's terms."""
    text = str(error.orig if isinstance(error, DBAPIError) else error).strip() or type(error).__name__
    text = without_secrets(text, url)
    lines = text.splitlines()
    said = lines[-1] if lines[0].startswith("Multiple connection attempts") else lines[0]
    meanings = {
        "database is locked": f"another process has locked the database for {WAIT_S} s; end it and try again",
        "lock timeout": "another process holds a lock in the database; end it and try again",
        "file is not a database": "the file is not a SQLite database; name another file",
        "malformed": "the database file is damaged; restore a copy, or name another file",
        "readonly": "the database cannot be written; check the permissions of the file and its folder",
        "unable to open": "the file cannot be opened; check the permissions of the file and its folder",
        "password authentication failed": f"the server refuses the password of user {url.username!r}",
        "no password supplied": f"the server requires a password for user {url.username!r}: user:password@host",
        "role": f"the server does not admit user {url.username!r} ({said})",
        "does not exist": f"the server has no database {url.database!r}; create it first",
        "permission denied": f"user {url.username!r} may not create tables in it ({said})",
    }
    for sign, meaning in meanings.items():
        if sign in text:
            return StorageError(f"{shown(url)}: {meaning}")
    return StorageError(f"{shown(url)}: cannot reach the database: {said}")
