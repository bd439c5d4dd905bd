"""MLflow's tables in a new SQLite database: all at once, and made by MLflow only once for each of its versions.

MLflow makes them by some fifty migrations, each statement of them committed: two seconds in which a process that is
killed leaves tables that MLflow never gets over. PostgreSQL's transactions hold tables, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from trainer.common.cache import cache_folder

log = logging.getLogger("search.tracking.sqlite")


def fill_in_one_go(uri: str, version: str, make_tables: Callable[[str], object]) -> None:
    """Give an empty SQLite database MLflow's tables, in one transaction. Other databases are left alone.

    They are copied from a file in the folder of LORA_SEARCH_CACHE, which is made if it is not there.

    Args:
        uri: of the database, held by `address.creating`.
        version: MLflow's.
        make_tables: opens a store at the URI that it is given, which makes its tables.

    Raises:
        sqlite3.Error: the database is locked, or the disk is full.
    """
    url = sa.make_url(uri) if uri.startswith("sqlite") else None
    if url is None or not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        return
    target = Path(url.database).absolute()
    with contextlib.closing(sqlite3.connect(target)) as database:
        if database.execute("SELECT 1 FROM sqlite_master").fetchone() is not None:
            return
    kept = cache_folder() / f"mlflow-{version}.db"
    if kept.is_file():
        try:
            _copy(kept, target)
        except sqlite3.DatabaseError as error:
            log.warning("%s cannot be used and is made anew: %s", kept, error)
        else:
            return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="mlflow-") as folder:
        beside = Path(folder) / "new.db"
        make_tables(f"sqlite:///{beside}")
        with contextlib.closing(sqlite3.connect(beside)) as made:
            made.execute("DELETE FROM experiments")  # "Default": its place for files is below the current folder
            made.commit()
        _copy(beside, target)
        with contextlib.suppress(OSError):  # a second is saved the next time, no more
            _keep(beside, kept)


def _copy(source: Path, target: Path) -> None:
    """All of a database into another, in one transaction.

    Raises:
        sqlite3.DatabaseError: the source is damaged, or the target locked; the target is as it was.
    """
    with (
        contextlib.closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as made,
        contextlib.closing(sqlite3.connect(target)) as database,
    ):
        (state,) = made.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(state)
        made.backup(database)


def _keep(source: Path, target: Path) -> None:
    """A copy of a closed database, which appears complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(source.read_bytes())
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
