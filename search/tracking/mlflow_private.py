"""Names of MLflow's that are not its public interface, each with what it is needed for.

MLflow may change them with any version: tests/search/tracking/test_mlflow_private.py looks for each in the MLflow that
is installed, and names those that are missing. This module does not import MLflow.
"""

from __future__ import annotations

import sqlalchemy as sa

# ---------------------------------------------------------------------- tables

EXPERIMENTS = sa.table("experiments", *map(sa.column, ("experiment_id", "artifact_location")))
"""MLflow has no call that changes where an experiment keeps its files, which moves with the runs folder."""
RUNS = sa.table("runs", *map(sa.column, ("run_uuid", "experiment_id", "status", "lifecycle_stage", "artifact_uri")))
"""Read at once with the two below, since the client needs a call for each metric of each run; `artifact_uri` as in
`EXPERIMENTS`. The columns are those of MLflow 1.0."""
TAGS = sa.table("tags", *map(sa.column, ("run_uuid", "key", "value")))
METRICS = sa.table("metrics", *map(sa.column, ("run_uuid", "key", "value", "timestamp", "step")))
TABLES = (EXPERIMENTS, RUNS, TAGS, METRICS)

# ---------------------------------------------------------------------- tags that MLflow's pages read

PARENT_RUN = "mlflow.parentRunId"
"""Nests a trial's run below the study's."""
NOTE = "mlflow.note.content"
"""The description on a run's page."""
USER = "mlflow.user"
SOURCE_NAME = "mlflow.source.name"
GIT_COMMIT = "mlflow.source.git.commit"
"""The columns "User", "Source" and "Version" of the table of runs."""
SYSTEM_TAGS = (PARENT_RUN, NOTE, USER, SOURCE_NAME, GIT_COMMIT)

# ---------------------------------------------------------------------- what only MLflow's pages know

VIEW = "mlflow.sharedViewState."
"""Tag of an experiment, its key at the end: a view that the pages open (`search.tracking.views`)."""
VIEW_PARAMETER = "viewStateShareKey"
"""Of the address that opens a view. A filter or an order in the address makes the pages ignore it."""
PAGE_NAMES = (
    *(VIEW, VIEW_PARAMETER, "compareRunCharts", "compareRunSections", "isAccordionReordered", "runsHiddenMode"),
    *("hideEmptyCharts", "selectedMetricKeys", "runsCountToCompare", "metricSectionId", "SHOW_ALL"),
    *("DIFFERENCE", "compareGroups", "baselineColumnUuid"),
)
"""Looked for in the pages' JavaScript."""

# ---------------------------------------------------------------------- modules

SQL_STORE = "mlflow.store.tracking.sqlalchemy_store"
"""Imported when a database is opened; ahead of time by `search.tracking.library.preload`."""
DATABASE_LOGGER = "mlflow.store.db.utils"
"""Logs what MLflow also raises, and each database it creates; what matters of it is in our own messages."""

# ---------------------------------------------------------------------- errors

AWAY = (
    *("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_CONFLICT"),
    *("REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"),
)
"""Error codes of an MLflow that is away or busy."""
TRANSIENT = (*AWAY, "PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "ENDPOINT_NOT_FOUND")
"""Error codes after which the same call may succeed: a locked database, a server that is away or busy, rights that are
given back, a proxy that does not find its server (a missing run is RESOURCE_DOES_NOT_EXIST)."""
ALREADY_EXISTS = "RESOURCE_ALREADY_EXISTS"
"""Another process created the experiment in the meantime."""
MISSING = "RESOURCE_DOES_NOT_EXIST"
"""Of a run that was deleted for good."""
OTHER_SCHEMA = "out-of-date database schema"
"""In the message about a database that another version of MLflow made."""
