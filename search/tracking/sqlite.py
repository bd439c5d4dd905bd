"""What MLflow's own SQLite database needs done to it, which MLflow does not do.

`fill_in_one_go`: a new database gets its tables all at once. MLflow makes them by some fifty migrations, each
statement committed: two seconds in which a process that is killed leaves tables that MLflow never gets over.
(PostgreSQL creates tables within transactions.)

`relocate`: the files of runs are found after the runs folder was moved. MLflow writes the absolute place of an
experiment's files into its database when the experiment is created, and a run's when the run is; it has no call that
changes them. The files of later runs would go to the old place, which MLflow would create again.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa

from search.errors import Unavailable
from search.places import sqlite_url
from search.tracking.mlflow_private import EXPERIMENTS, RUNS
from search.urls import first_line, shown
from trainer.common.cache import cache_folder
from trainer.common.files import write_whole

log = logging.getLogger("search.tracking.sqlite")


def fill_in_one_go(uri: str, version: str, make_tables: Callable[[str], object]) -> None:
    """Give an empty SQLite database MLflow's tables, in one transaction. Other databases are left alone.

    They are copied from a file in the folder of LORA_SEARCH_CACHE, one for each version of MLflow, which is made if it
    is missing.

    Args:
        uri: The database's, held by `address.creating`.
        version: MLflow's.
        make_tables: Opens a store at the URI that it is given, which makes its tables.

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
            log.warning("%s cannot be used and is made again: %s", kept, error)
        else:
            return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="mlflow-") as folder:
        beside = Path(folder) / "new.db"
        make_tables(sqlite_url(beside))
        with contextlib.closing(sqlite3.connect(beside)) as made:
            made.execute(str(sa.delete(EXPERIMENTS)))  # "Default": its place for files is below the current folder
            made.commit()
        _copy(beside, target)
        with contextlib.suppress(OSError):  # it only saves two seconds the next time
            _keep(beside, kept)


def _copy(source: Path, target: Path) -> None:
    """Copy all of a database into another, in one transaction.

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
    write_whole(target, source.read_bytes())


def relocate(uri: str, experiment_id: str, location: str) -> None:
    """Let an experiment and its runs keep their files at `location`, if their old folder is gone.

    Only on SQLite, whose file lies beside the artifacts: hosts that share a database server have different folders.

    Args:
        uri: MLflow's database.
        experiment_id: The study's.
        location: A `file:` URI, the folder of the study's artifacts below the present runs folder.

    Raises:
        Unavailable: another process holds the database.
    """
    if sa.make_url(uri).get_backend_name() != "sqlite":
        return
    engine = sa.create_engine(uri)
    number = int(experiment_id)
    try:
        with engine.begin() as connection:
            query = sa.select(EXPERIMENTS.c.artifact_location).where(EXPERIMENTS.c.experiment_id == number)
            old = connection.execute(query).scalar()
            if old is None or old == location or not _is_gone(old):
                return
            here = RUNS.c.artifact_uri
            behind = sa.literal(location).concat(sa.func.substr(here, len(old) + 1))
            inside = sa.func.substr(here, 1, len(old) + 1) == old + "/"
            connection.execute(sa.update(RUNS).where(inside).values(artifact_uri=behind))
            mine = EXPERIMENTS.c.experiment_id == number
            connection.execute(sa.update(EXPERIMENTS).where(mine).values(artifact_location=location))
    except sa.exc.OperationalError as error:  # locked, or read-only
        raise Unavailable(f"writing to {shown(uri)} where files of runs are: {first_line(error)}") from error
    finally:
        engine.dispose()
    log.info("the folder %s is gone; MLflow keeps the files of this study in %s from now on", old, location)


def _is_gone(location: str) -> bool:
    """Whether this is a folder on this machine that is not there."""
    parts = urlsplit(location)
    return parts.scheme in ("", "file") and not parts.netloc and not Path(unquote(parts.path)).exists()
