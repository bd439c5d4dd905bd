"""Metrics read back from MLflow as records, and the fast way to read many runs from its database."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import sqlalchemy as sa

from search.errors import StorageError
from search.records import EpochRecord, StepRecord
from search.tracking.outbox import Create, End, Outbox, Resume, Write

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""(step, value) in the order they were written, by metric."""

EPOCH_METRICS = {f.name: f.name for f in fields(EpochRecord) if f.name != "epoch"}
STEP_METRICS = {f"step/{f.name}": f.name for f in fields(StepRecord) if f.name != "step"}
"""Field by metric: the records' fields are the one list of the metrics' names."""

RUNS_PER_QUERY = 50
"""Runs read by one query: keeps both the query and its result small."""


@dataclass(frozen=True, kw_only=True)
class RunCurves:
    """One MLflow run, read back."""

    status: str
    """MLflow's: RUNNING, FINISHED, FAILED, KILLED."""
    tags: dict[str, str]
    epochs: tuple[EpochRecord, ...]
    steps: tuple[StepRecord, ...]


def _by_step(curves: Curves, names: Mapping[str, str]) -> list[tuple[int, dict[str, float]]]:
    """(step, values by field) for the metrics named, by step; the last value written wins."""
    rows: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for key, name in names.items():
        for step, value in curves.get(key, ()):
            rows[step][name] = value
    return sorted(rows.items())


def epoch_records(curves: Curves) -> tuple[EpochRecord, ...]:
    """The metrics at step = epoch."""
    return tuple(EpochRecord(epoch=epoch, **values) for epoch, values in _by_step(curves, EPOCH_METRICS))


def step_records(curves: Curves) -> tuple[StepRecord, ...]:
    """The metrics at step = optimizer step."""
    return tuple(StepRecord(step=step, **values) for step, values in _by_step(curves, STEP_METRICS))


def spooled(spool: Outbox) -> dict[str, RunCurves]:
    """What a spool holds of its runs, by the ids they have there."""
    found = {}
    for run_id in spool.runs():
        curves: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        tags: dict[str, str] = {}
        status = "RUNNING"
        for entry, _ in spool.read(run_id):
            match entry:
                case Write():
                    tags.update(entry.tags)
                    for point in entry.points:
                        curves[point.key].append((point.step, point.value))
                case Create() | Resume():
                    tags.update(entry.tags)
                case End():
                    tags.update(entry.tags)
                    status = entry.status
        found[run_id] = RunCurves(status=status, tags=tags, epochs=epoch_records(curves), steps=step_records(curves))
    return found


def merged(delivered: RunCurves | None, kept: RunCurves | None) -> RunCurves:
    """A run of which a part is delivered, and a part still in the spool."""
    if delivered is None or kept is None:
        run = delivered or kept
        assert run is not None
        return run
    epochs = {record.epoch: record for record in delivered.epochs}
    for record in kept.epochs:
        known = {key: value for key, value in vars(record).items() if value is not None}
        epochs[record.epoch] = replace(epochs.get(record.epoch, record), **known)
    steps = {record.step: record for record in (*kept.steps, *delivered.steps)}
    return RunCurves(
        status=kept.status,
        tags={**delivered.tags, **kept.tags},
        epochs=tuple(epochs[epoch] for epoch in sorted(epochs)),
        steps=tuple(steps[step] for step in sorted(steps)),
    )


class SqlReader:
    """Reads curves and tags straight from MLflow's tables `runs`, `tags` and `metrics`.

    MLflow's client needs a call for each metric of each run: 350 s for 1,000 runs of 500 steps and 15 epochs on
    SQLite, against 5 s this way (1.65 million rows, 2 cores, MLflow 3.17). Only selects; the columns
    used are those of MLflow 1.0, and a test compares the result with the client's.
    """

    def __init__(self, uri: str) -> None:
        self._engine = sa.create_engine(uri, pool_pre_ping=True)
        self._runs = sa.table("runs", *map(sa.column, ("run_uuid", "experiment_id", "status", "lifecycle_stage")))
        self._tags = sa.table("tags", *map(sa.column, ("run_uuid", "key", "value")))
        columns = ("run_uuid", "key", "value", "timestamp", "step", "is_nan")
        self._metrics = sa.table("metrics", *map(sa.column, columns))

    def curves(self, run_ids: Sequence[str]) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Metrics by run and key."""
        m = self._metrics.c
        found: defaultdict[str, defaultdict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
        query = sa.select(m.run_uuid, m.key, m.step, m.value).where(m.run_uuid.in_(run_ids)).order_by(m.timestamp)
        for run_id, key, step, value in self._select(query):
            found[run_id][key].append((step, value))
        return {run_id: dict(curves) for run_id, curves in found.items()}

    def runs(self, experiment_id: str) -> dict[str, RunCurves]:
        """Every run of an experiment that was not deleted, by id."""
        r, t = self._runs.c, self._tags.c
        query = sa.select(r.run_uuid, r.status).where(
            r.experiment_id == int(experiment_id), r.lifecycle_stage == "active"
        )
        status = {run_id: str(value) for run_id, value in self._select(query)}
        ids = list(status)
        found = {}
        for low in range(0, len(ids), RUNS_PER_QUERY):
            some = ids[low : low + RUNS_PER_QUERY]
            curves = self.curves(some)
            tags: defaultdict[str, dict[str, str]] = defaultdict(dict)
            for run_id, key, value in self._select(sa.select(t.run_uuid, t.key, t.value).where(t.run_uuid.in_(some))):
                tags[run_id][key] = value
            for run_id in some:
                own = curves.get(run_id, {})
                found[run_id] = RunCurves(
                    status=status[run_id], tags=tags[run_id], epochs=epoch_records(own), steps=step_records(own)
                )
        return found

    def _select(self, query: sa.Select[Any]) -> Iterable[Any]:
        try:
            with self._engine.connect() as connection:
                return connection.execute(query).all()
        except sa.exc.SQLAlchemyError as error:
            raise StorageError(f"reading the MLflow database: {str(error).splitlines()[0]}") from error
