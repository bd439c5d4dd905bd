"""Where MLflow keeps the files of runs, after the runs folder was moved.

MLflow writes the absolute place of an experiment's files into its database when the experiment is created, and that of
a run's when the run is; it has no call that changes them. A folder of runs that was moved with its database would get
the files of later runs at the old place, which MLflow makes anew.
"""

from __future__ import annotations

import logging
from pathlib import Path
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa

from search.errors import Unavailable
from search.tracking.address import first_line, masked

log = logging.getLogger("search.tracking.artifacts")

EXPERIMENTS = sa.table("experiments", sa.column("experiment_id"), sa.column("artifact_location"))
RUNS = sa.table("runs", sa.column("artifact_uri"))


def relocate(uri: str, experiment_id: str, location: str) -> None:
    """Let an experiment and its runs keep their files at `location`, if their old folder is gone.

    Only on SQLite, whose file lies beside the artifacts: to a database server other hosts have other folders.

    Args:
        uri: MLflow's database.
        experiment_id: of the study.
        location: a `file:` URI, the folder of the study's artifacts below the present runs folder.

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
        raise Unavailable(f"saying in {masked(uri)} where files of runs are: {first_line(error)}") from error
    finally:
        engine.dispose()
    log.info("the folder %s is gone; MLflow's files of this study are looked for in %s from now on", old, location)


def _is_gone(location: str) -> bool:
    """Whether this is a folder on this machine that is not there."""
    parts = urlsplit(location)
    return parts.scheme in ("", "file") and not parts.netloc and not Path(unquote(parts.path)).exists()
