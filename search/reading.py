"""A study, read back: states, values and reasons from Optuna's storage, curves and tags from MLflow.

Optuna is the truth about trials. Where MLflow has no curve for an epoch (a run that is gone, a store that was moved,
a server that is away), what the outbox holds and the losses that Optuna keeps itself stand in, so that a report never
shows less than was recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import optuna

from search import records
from search.records import EpochRecord, StudyRecord, TrialRecord
from search.storage import studies
from search.storage.lifecycle import records_of
from search.tracking.client import Tracking
from search.tracking.outbox import Outbox
from search.tracking.pages import server_url
from search.tracking.reader import RunCurves, merged, undelivered, undelivered_times
from search.tracking.tags import RECORD_ID


def read_study(
    study: optuna.Study, tracking: Tracking | None = None, outbox: Outbox | None = None, *, away: bool = False
) -> StudyRecord:
    """Everything recorded about a study, in two bulk reads.

    Args:
        study: The Optuna study, see `search.storage.studies.find_study`.
        tracking: MLflow's store; None for what Optuna alone knows.
        outbox: What is not yet delivered to it.
        away: There is a store, but it does not answer.

    Raises:
        StorageError: MLflow's store cannot be read.
    """
    experiment_id = tracking.find_experiment(study.study_name) if tracking is not None else None
    runs: Mapping[str, RunCurves] = {}
    parent = None
    if tracking is not None and experiment_id is not None:
        runs = tracking.runs(experiment_id)
        parent = tracking.find_parent(study.study_name)
    ids = {run.tags[RECORD_ID]: run_id for run_id, run in runs.items() if RECORD_ID in run.tags}
    kept = {ids.get(run_id, run_id): run for run_id, run in undelivered(outbox).items()} if outbox is not None else {}
    runs = {run_id: merged(runs.get(run_id), kept.get(run_id)) for run_id in {**runs, **kept}}
    found = study.get_trials(deepcopy=False)  # once: a trial may begin, and epochs come, between two readings
    reported = {t.number: dict(t.intermediate_values) for t in found}
    attrs = dict(study.user_attrs)
    return StudyRecord(
        name=study.study_name,
        definition=dict(attrs.pop(studies.DEFINITION, {})),
        attrs=attrs,
        trials=tuple(
            _with_run(trial, runs.get(trial.run_id or ""), reported[trial.number])
            for trial in (replace(t, run_id=ids.get(t.run_id or "", t.run_id)) for t in records_of(found))
        ),
        experiment_id=experiment_id,
        parent_run_id=parent,
        tracking_url=server_url(tracking.uri) if tracking is not None else None,
        away=away,
    )


def epoch_times(study: optuna.Study, tracking: Tracking | None, outbox: Outbox) -> dict[int, dict[int, float]]:
    """When the epochs of each trial were reported, in seconds since the epoch (UTC), as far as that is recorded.

    Optuna has the losses alone. A trial that took up a lost one's work has that one's epochs too: they were trained
    when they were first reported.

    Raises:
        StorageError: MLflow's store cannot be read.
    """
    experiment_id = tracking.find_experiment(study.study_name) if tracking is not None else None
    delivered = tracking.times(experiment_id) if tracking is not None and experiment_id is not None else {}
    kept = undelivered_times(outbox)
    found: dict[int, dict[int, float]] = {}
    for trial in records_of(study.get_trials(deepcopy=False)):
        run_id = trial.run_id or ""
        times: dict[int, float] = {}
        before = found.get(trial.attrs.get(records.RESUMES, -1), {})
        for some in (before, delivered.get(run_id, {}), kept.get(run_id, {})):
            times |= {epoch: min(at, times.get(epoch, at)) for epoch, at in some.items()}
        found[trial.number] = times
    return found


def _with_run(trial: TrialRecord, run: RunCurves | None, reported: Mapping[int, float]) -> TrialRecord:
    """The trial with its run's curves and tags, gaps filled from Optuna's own values."""
    known = {record.epoch: record for record in run.epochs} if run is not None else {}
    train_losses = trial.attrs.get(records.TRAIN_LOSSES, ())
    train = {epoch: loss for epoch, loss in enumerate(train_losses, start=1) if _finite(loss)}
    val = {epoch: loss for epoch, loss in reported.items() if _finite(loss)}
    epochs = []
    for epoch in sorted({*known, *val, *range(1, len(train_losses) + 1)}):
        record = known.get(epoch, EpochRecord(epoch=epoch))
        if record.train_loss is None:
            record = replace(record, train_loss=train.get(epoch))
        if record.val_loss is None:
            record = replace(record, val_loss=val.get(epoch))
        epochs.append(record)
    if run is None:
        return replace(trial, epochs=tuple(epochs))
    return replace(trial, epochs=tuple(epochs), steps=run.steps, tags=dict(run.tags))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
