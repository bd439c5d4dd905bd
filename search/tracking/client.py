"""`Tracking`: runs in one MLflow store, created, written, ended and read back.

All calls name their run. MLflow's fluent interface (active run, autolog, global tracking URI) is never used:
nested and parallel runs trip over it (optuna#5148, ray#19978).
"""

from __future__ import annotations

import json
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from search import records
from search.errors import StorageError, Unavailable
from search.records import STUDY_ID
from search.tracking import address, experiments, models, views
from search.tracking.environment import here, run_tags
from search.tracking.errors import translated
from search.tracking.judgement import is_ours
from search.tracking.library import VERSION, Metric, MlflowClient, MlflowException, Param, Run, RunTag
from search.tracking.mlflow_private import AWAY, NOTE, OTHER_SCHEMA, PARENT_RUN
from search.tracking.outbox import DataUsed, Model, Outbox, Point, Status, is_local
from search.tracking.reader import (
    ClientReader,
    Reader,
    RunCurves,
    SqlReader,
    Times,
    epoch_records,
    search,
    step_records,
)
from search.tracking.recorder import CLOSE_S, Logged, RunRecorder
from search.tracking.sqlite import fill_in_one_go, relocate
from search.tracking.tags import FACTS, HIDDEN, RECORD_ID, hidden, inward, outward
from search.urls import shown

METRICS_PER_BATCH = 1_000
"""MLflow's limit, like the two below."""
TAGS_PER_BATCH = 100
TAG_LENGTH = 8_000

KIND = "kind"
"""Tag: `study` for the parent run, `trial` for the others."""
STUDY = "study"
"""Tag: the study's name."""


def as_text(value: Any) -> str:
    """A field of TrainConfig as `--set` reads it back: lists joined by commas, None as `none`."""
    if isinstance(value, tuple | list):
        return ",".join(str(item) for item in value)
    return "none" if value is None else str(value)


def open_tracking(uri: str, artifact_root: Path, study_id: str | None = None) -> Tracking:
    """Open the store of runs, and create its tables if it has none (seconds, once; others wait meanwhile).

    Args:
        uri: A database as SQLAlchemy writes it (`sqlite:///runs/mlflow.db`, `postgresql://...`), or the
            `http(s)://` address of an MLflow server.
        artifact_root: Folder of the files of runs; a server keeps them in its own place.
        study_id: `records.STUDY_ID` of the study whose runs are meant: another of its name may be there too. None to
            go by the name.

    Raises:
        Unavailable: a server or database that does not answer.
        StorageError: a kind of store that MLflow refuses, a broken database.
    """
    address.check(uri)
    # The deprecation warning is about MLflow's own models under SQLAlchemy 2.1, none of the user's business.
    with address.creating(uri), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fill_in_one_go(uri, VERSION, _client)
            client = _client(uri)
        except MlflowException as error:
            if isinstance(error.__context__, OSError):  # requests' errors are: it did not get through
                raise address.unreachable(uri, error) from error
            away = error.error_code in AWAY and OTHER_SCHEMA not in str(error)
            raise (Unavailable if away else StorageError)(address.explain(uri, error)) from error
        except (SQLAlchemyError, sqlite3.Error) as error:  # while making tables MLflow passes them on as they are
            kind = Unavailable if "locked" in str(error) else StorageError
            raise kind(address.explain(uri, error)) from error
    return Tracking(client, uri, artifact_root, study_id)


def _client(uri: str) -> MlflowClient:
    """A client of a store that has its tables, made now if they are missing."""
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.search_experiments(max_results=1)
    return client


class Tracking:
    """Runs in one MLflow store: an experiment for a study, a parent run for the study, a child run for a trial."""

    def __init__(self, client: MlflowClient, uri: str, artifact_root: Path, study_id: str | None = None) -> None:
        self._client = client
        self._study_id = study_id
        self.uri = uri
        self._artifact_root = artifact_root.resolve()
        self._on_server = uri.startswith("http")
        self._reader: Reader = ClientReader(client) if self._on_server else SqlReader(uri)

    def __repr__(self) -> str:
        return f"Tracking({shown(self.uri)!r})"

    # ------------------------------------------------------------------ experiments and runs

    def find_experiment(self, study_name: str) -> str | None:
        """Id of the study's experiment, None if there is none."""
        found = experiments.find(self._client, self.uri, study_name, self._study_id)
        return None if found is None else str(found.experiment_id)

    def experiment(self, study_name: str) -> str:
        """Id of the study's experiment, created if there is none. Any number of processes may ask at once."""
        location = None if self._on_server else (self._artifact_root / study_name).as_uri()
        found = experiments.find(self._client, self.uri, study_name, self._study_id)
        if found is None:
            experiments.create(self._client, study_name, self._study_id, location)
            return self.experiment(study_name)
        if self._study_id is not None and STUDY_ID not in found.tags:
            with translated(f"marking experiment {study_name!r}"):
                self._tag(found.experiment_id, STUDY_ID, self._study_id)
        if location is not None:
            relocate(self.uri, str(found.experiment_id), location)
        return str(found.experiment_id)

    def describe(self, study_name: str, tags: Mapping[str, str]) -> None:
        """Bring the experiment's tags and the views of its runs up to date; writes only what has changed."""
        found = experiments.find(self._client, self.uri, study_name, self._study_id)
        if found is None:
            return
        with translated(f"describing experiment {study_name!r}"):
            for key, value in tags.items():
                if found.tags.get(key) != value:
                    self._tag(found.experiment_id, key, value)

    def _tag(self, experiment_id: str, key: str, value: str) -> None:
        """Set a tag of an experiment, where another search may set it at once."""
        _at_once(lambda: self._client.set_experiment_tag(experiment_id, key, value))

    def find_parent(self, study_name: str) -> str | None:
        """Id of the study's parent run, None if there is none."""
        experiment_id = self.find_experiment(study_name)
        if experiment_id is None:
            return None
        with translated(f"looking for the run of study {study_name!r}"):
            runs = self._client.search_runs(
                [experiment_id], f"tags.{KIND} = 'study'", max_results=1, order_by=["attributes.start_time ASC"]
            )
        return str(runs[0].info.run_id) if runs else None

    def parent_run(self, study_name: str, tags: Mapping[str, str], params: Mapping[str, str] | None = None) -> str:
        """Id of the study's parent run, set to RUNNING; its tags are brought up to date.

        Params that it has stay as they are: MLflow changes none.
        """
        found = self.some_parent(study_name, tags)
        with translated(f"continuing the run of study {study_name!r}"):
            self._client.update_run(found, status="RUNNING")
        self.write(found, (), tags)
        if params:
            with translated(f"reading run {found}"):
                known = self._client.get_run(found).data.params
            self.set_params(found, {key: value for key, value in params.items() if key not in known})
        self.describe(study_name, views.tags(cider=(params or {}).get("objective") == "cider"))
        return found

    def some_parent(self, study_name: str, tags: Mapping[str, str]) -> str:
        """Id of the study's parent run, created with these tags if there is none; one that is there stays as it is."""
        found = self.find_parent(study_name)
        if found is None:
            mine = {**run_tags(), KIND: "study", STUDY: study_name, **tags}
            if self._study_id is not None:
                mine[STUDY_ID] = self._study_id
            created = self._create_run(self.experiment(study_name), study_name, mine)
            # Of several that were created at once all processes keep the same one: the first.
            found = self.find_parent(study_name)
            assert found is not None
            if found != created:
                with translated("deleting a second parent run"):
                    self._client.delete_run(created)
        return found

    def start_run(
        self, experiment_id: str, parent_run_id: str, *, name: str, config: Mapping[str, Any], tags: Mapping[str, str]
    ) -> str:
        """A new child run of a trial, with every field of the resolved configuration as a param.

        Args:
            name: Shown in lists of runs and in the legends of charts.
            config: `TrainConfig.model_dump()`.
            tags: Over those of `search.tracking.environment`.
        """
        params = {key: as_text(value) for key, value in config.items()}
        return self.create_trial(experiment_id, parent_run_id, name, params, {**run_tags(), **tags})

    def create_trial(
        self,
        experiment_id: str,
        parent_run_id: str,
        name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        start_ms: int | None = None,
    ) -> str:
        """The run of a trial: as `start_run`, but with params as text, exactly these tags, and its start."""
        own = {PARENT_RUN: parent_run_id, KIND: "trial", "state": "RUNNING", **tags}
        run_id = self._create_run(experiment_id, name, own, start_ms)
        self.set_params(run_id, params)
        return run_id

    def set_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Set params. Doing it twice with the same values changes nothing."""
        every = [Param(key, value) for key, value in params.items()]
        with translated(f"recording the configuration of run {run_id}"):
            for low in range(0, len(every), TAGS_PER_BATCH):
                batch = every[low : low + TAGS_PER_BATCH]
                _at_once(lambda batch=batch: self._client.log_batch(run_id, params=batch))  # type: ignore[misc]

    def _create_run(self, experiment_id: str, name: str, tags: Mapping[str, str], start_ms: int | None = None) -> str:
        fitting = {key: _fit(value) for key, value in outward(tags).items()}
        with translated(f"creating run {name!r}"):
            run = self._client.create_run(experiment_id, run_name=name, tags=fitting, start_time=start_ms)
        return str(run.info.run_id)

    def find_record(self, experiment_id: str, record_id: str) -> str | None:
        """Id of the run with this `RECORD_ID`, None if there is none.

        A creation that timed out and was done again may have succeeded twice: the first stays, others are deleted.
        """
        query = f"tags.{RECORD_ID} = '{record_id}'"
        found = [*search(self._client, experiment_id, query, "attributes.start_time ASC")]
        for other in found[1:]:
            with translated("deleting a second run of a trial"):
                self._client.delete_run(other.info.run_id)
        return str(found[0].info.run_id) if found else None

    def resolve(self, study_name: str, run_id: str) -> str:
        """MLflow's id of a run that a trial names, which began in the outbox if the id is a `local_id`.

        Raises:
            StorageError: MLflow has no such run.
        """
        if not is_local(run_id):
            return run_id
        experiment = self.find_experiment(study_name)
        found = None if experiment is None else self.find_record(experiment, run_id)
        if found is None:
            raise StorageError(f"MLflow has no run {run_id}; if the study's folder `spool` holds it, deliver it first")
        return found

    def resume_run(self, run_id: str, tags: Mapping[str, str] | None = None) -> None:
        """Set a run that ended back to RUNNING, without the findings, the reason and our description of its end.

        Args:
            run_id: MLflow's.
            tags: Where it goes on; this process by default.
        """
        stale = ("reason", "detail", "best_epoch", "finding", "findings", "tracking_lost")
        with translated(f"continuing run {run_id}"):
            run: Run = self._client.get_run(run_id)
            self._client.update_run(run_id, status="RUNNING")
            for key in run.data.tags:
                name = key.removeprefix(HIDDEN)
                ours = key == NOTE and is_ours(run.data.tags[key])
                if name in stale or name.startswith("finding.") or ours:
                    self._client.delete_tag(run_id, key)
        self.write(run_id, (), {"state": "RUNNING", **(here() if tags is None else tags)})

    def recorder(
        self, run_id: str, *, outbox: Outbox | None = None, flush_s: float = 10.0, close_s: float = CLOSE_S
    ) -> RunRecorder:
        """A sink for the events of a run. `recorder.logged` says what the run already has."""
        return RunRecorder(self, run_id, self.logged(run_id), outbox=outbox, flush_s=flush_s, close_s=close_s)

    def logged(self, run_id: str) -> Logged:
        """What the run has."""
        curves, tags = self._curves(run_id)
        return Logged(steps={key: max(step for step, _ in values) for key, values in curves.items()}, tags=tags)

    def close_dangling(self, experiment_id: str, is_dead: Callable[[Mapping[str, str]], bool]) -> tuple[str, ...]:
        """End the runs that dead processes left RUNNING, as KILLED with reason `lost`.

        Args:
            is_dead: Whether the process that made a run with these tags (`host`, `pid`, `kind`, ...) is gone.

        Returns:
            Ids of the runs it ended.
        """
        closed = []
        for run in search(self._client, experiment_id, "attributes.status = 'RUNNING'"):
            if is_dead(inward(run.data.tags)):
                self.end_run(run.info.run_id, "KILLED", {"state": "FAIL", "reason": records.LOST})
                closed.append(str(run.info.run_id))
        return tuple(closed)

    def waiting(self, experiment_id: str) -> dict[str, dict[str, str]]:
        """The tags of an experiment's runs, by run id, that say of their trial that it waits."""
        runs = search(self._client, experiment_id, "tags.state = 'WAITING'")
        return {str(run.info.run_id): inward(run.data.tags) for run in runs}

    # ------------------------------------------------------------------ writing (search.tracking.writer.RunStore)

    def write(self, run_id: str, points: Iterable[Point], tags: Mapping[str, str]) -> None:
        """Write metrics and tags, in as few batches as MLflow allows. Doing it twice leaves one of each."""
        metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in points]
        run_tags = [RunTag(key, _fit(value)) for key, value in outward(tags).items()]
        with translated(f"writing to run {run_id}"):
            while metrics or run_tags:
                # A batch holds at most 1,000 of all kinds together.
                some_tags, run_tags = run_tags[:TAGS_PER_BATCH], run_tags[TAGS_PER_BATCH:]
                room = METRICS_PER_BATCH - len(some_tags)
                some, metrics = metrics[:room], metrics[room:]
                self._client.log_batch(run_id, metrics=some, tags=some_tags)

    def end_run(
        self,
        run_id: str,
        status: Status,
        tags: Mapping[str, str],
        description: str = "",
        end_ms: int | None = None,
    ) -> None:
        """Set the last tags and the description (Markdown), and end the run: now, or at `end_ms`.

        The tags that MLflow's pages do not show are then a file of the run.
        """
        self.write(run_id, (), {**tags, **({NOTE: description} if description else {})})
        with translated(f"reading run {run_id}"):
            facts = inward(hidden(self._client.get_run(run_id).data.tags))
        if facts:
            self.log_text(run_id, json.dumps(facts, indent=1, ensure_ascii=False), FACTS)
        with translated(f"ending run {run_id}"):
            self._client.set_terminated(run_id, status, end_time=end_ms or int(time.time() * 1000))

    def log_text(self, run_id: str, text: str, file: str) -> None:
        """Keep a text as a file of the run."""
        with translated(f"keeping {file} with run {run_id}"):
            self._client.log_text(run_id, text, file)

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Keep a copy of a file with the run."""
        with translated(f"keeping {path.name} with run {run_id}"):
            self._client.log_artifact(run_id, str(path), folder)

    def log_data(self, run_id: str, data: DataUsed) -> None:
        """Name the data that a run trains on. Doing it twice leaves one."""
        models.log_data(self._client, run_id, data)

    def keep_model(self, run_id: str, model: Model) -> None:
        """Keep an adapter as the run's model, and register it. Doing it twice leaves one."""
        models.keep(self._client, run_id, model, self._study_id)

    # ------------------------------------------------------------------ reading

    def tags(self, run_id: str) -> dict[str, str]:
        """All tags of a run."""
        with translated(f"reading run {run_id}"):
            return inward(self._client.get_run(run_id).data.tags)

    def epochs(self, run_id: str) -> tuple[records.EpochRecord, ...]:
        """The metrics of a run by epoch."""
        return epoch_records(self._curves(run_id)[0])

    def steps(self, run_id: str) -> tuple[records.StepRecord, ...]:
        """The metrics of a run by optimizer step, or by windows of steps in a long run."""
        return step_records(self._curves(run_id)[0])

    def runs(self, experiment_id: str) -> dict[str, RunCurves]:
        """Every run of an experiment, the parent included, by run id: curves, tags and status."""
        return self._reader.runs(experiment_id)

    def times(self, experiment_id: str) -> Times:
        """When the epochs of an experiment's runs were reported."""
        return self._reader.times(experiment_id)

    def _curves(self, run_id: str) -> tuple[dict[str, list[tuple[int, float]]], dict[str, str]]:
        """(metrics as (step, value) by key, tags) of a run."""
        with translated(f"reading run {run_id}"):
            run: Run = self._client.get_run(run_id)
        return self._reader.curves(run), inward(run.data.tags)


def _at_once(write: Callable[[], object]) -> None:
    """Write what another search may write at the same moment.

    MLflow's server looks whether it has a tag or param, and adds it if not. Where two do so at once its database
    refuses the second's as a duplicate (BAD_REQUEST, UniqueViolation) with all that came with it; written again, it
    finds the first's. A param with another value is still refused, as MLflow does.
    """
    for attempts_left in (2, 1, 0):  # the second write may meet a third search
        try:
            write()
            return
        except MlflowException as error:
            if not attempts_left or not any(word in str(error).lower() for word in ("unique", "duplicate")):
                raise


def _fit(value: str) -> str:
    """The value, cut to what MLflow takes as a tag."""
    return value if len(value) <= TAG_LENGTH else value[: TAG_LENGTH - 2] + " …"
