"""`StudyRuns`: the MLflow runs of a study as the search opens and ends them, whether or not MLflow answers.

What MLflow does not take goes to the outbox, and `search.tracking.delivery` delivers it. Nothing here waits longer for
MLflow than one call takes, and nothing raises because it is away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from search import records
from search.diagnosis.finding import Finding
from search.errors import StorageError, Unavailable
from search.places import Places
from search.storage.identity import id_of
from search.tracking import client as store
from search.tracking import judgement
from search.tracking.client import Tracking, as_text
from search.tracking.environment import here, run_tags
from search.tracking.mlflow_private import NOTE
from search.tracking.outbox import (
    STUDY,
    Create,
    End,
    Entry,
    File,
    Model,
    Outbox,
    Point,
    Resume,
    Status,
    StudyBegun,
    Write,
    local_id,
)
from search.tracking.recorder import RunRecorder, run_status
from search.tracking.tags import RECORD_ID
from search.tracking.writer import send

log = logging.getLogger("search.tracking.runs")

LOST_END = ("FAIL", records.LOST)
"""State and reason of a trial that was lost."""


class StudyRuns:
    """The runs of one study in one MLflow store. Each process has its own; they share the outbox."""

    def __init__(self, places: Places, study: str, study_id: str | None = None) -> None:
        """Opens nothing yet.

        Args:
            places: Where MLflow's store, files of runs and the outbox are.
            study: Name of the study, of its experiment and of its parent run.
            study_id: Its own id; None for what its folder says.
        """
        self.uri, self.study = places.tracking_uri, study
        self.outbox = Outbox(places.outbox(study))
        self._artifact_root = places.artifacts
        self._folder, self._study_id = places.study(study), study_id
        self._tracking: Tracking | None = None
        self._place: tuple[str, str] | None = None

    def connect(self) -> Tracking:
        """The store, opened at the first call that finds it there.

        Raises:
            Unavailable: it does not answer.
            StorageError: it cannot be used.
        """
        if self._tracking is None:
            study_id = self._study_id or id_of(self._folder)
            self._tracking = store.open_tracking(self.uri, self._artifact_root, study_id)
        return self._tracking

    def experiment_id(self) -> str | None:
        """Id of the study's experiment, None if MLflow has not answered yet."""
        return self._place[0] if self._place is not None else None

    # ------------------------------------------------------------------ the study's own run

    def start_study(self, tags: Mapping[str, str], params: Mapping[str, str] | None = None) -> str | None:
        """Set the study's run to RUNNING. Returns why MLflow did not take it, None if it did.

        Raises:
            StorageError: the store cannot be used, for a reason that will not pass by itself.
        """
        try:
            if not self.outbox.runs():
                self.connect().parent_run(self.study, tags, params)
                return None
            self.connect()
            why = None
        except Unavailable as error:
            why = str(error)
        self.outbox.append(STUDY, [StudyBegun(tags={**run_tags(), **tags}, params=dict(params or {}))])
        return why

    def end_study(self, status: Status, tags: Mapping[str, str]) -> None:
        """End the study's run, which a later search resumes."""
        self._write(STUDY, End(status=status, tags=dict(tags), description="", end_ms=_now_ms()))

    def keep(self, path: Path, folder: str | None = None) -> None:
        """Keep a copy of a file with the study's run."""
        self._write(STUDY, File(path=str(path.absolute()), folder=folder))

    def add(self, run_id: str, points: Sequence[Point], tags: Mapping[str, str]) -> None:
        """Metrics and tags for a run that has ended (`outbox.STUDY` for the study's own)."""
        self._write(run_id, Write(points=list(points), tags=dict(tags)))

    def describe(self, tags: Mapping[str, str]) -> None:
        """Bring the tags of the study's experiment up to date, with its runs' views; not while MLflow is away."""
        try:
            self.connect().describe(self.study, tags)
        except Unavailable as error:
            log.warning("the experiment is not described: %s", error)

    def keep_model(self, run_id: str, model: Model) -> None:
        """Keep an adapter as a run's model, and register it."""
        self._write(run_id, model)

    def close_dangling(self, is_dead: Callable[[Mapping[str, str]], bool]) -> None:
        """End the runs that dead processes left RUNNING; a later call does, if MLflow is away."""
        if self.outbox.runs():
            return  # a run whose end is not delivered yet looks the same
        try:
            tracking = self.connect()
            tracking.close_dangling(tracking.experiment(self.study), is_dead)
        except Unavailable as error:
            log.warning("no search for runs of dead processes: %s", error)

    def settle(self, trials: Iterable[records.TrialRecord]) -> None:
        """End the runs of ended trials as these did, where MLflow says otherwise; a later call does, if it is away.

        A lost trial's: who took it up was killed, or lost the database, before it had the run ended; or its own worker
        could tell MLflow of an error and no longer Optuna. One that waits: the database had taken the trial's end, but
        its answer was lost, so that the worker said that the trial is interrupted.
        """
        if self.outbox.runs():
            return
        ended = {str(t.number): t for t in trials if t.state in ("COMPLETE", "PRUNED", "FAIL")}
        try:
            tracking = self.connect()
            found = tracking.waiting(tracking.experiment(self.study))
            of_trials = {tags.get("trial"): run_id for run_id, tags in found.items() if tags.get("kind") == "trial"}
            lost = {number: t.run_id for number, t in ended.items() if (t.state, t.reason) == LOST_END and t.run_id}
            for number in sorted(ended.keys() & (of_trials.keys() | lost.keys()), key=int):
                trial = ended[number]
                try:
                    run_id = of_trials.get(number) or tracking.resolve(self.study, lost[number])
                    _end_as(tracking, run_id, trial)
                except Unavailable:
                    raise
                except StorageError as error:  # deleted by someone
                    log.warning("the run of trial %s is not ended: %s", number, error)
        except Unavailable as error:
            log.warning("no search for runs that say otherwise than their trials: %s", error)

    # ------------------------------------------------------------------ runs of trials

    def begin(self, name: str, config: Mapping[str, Any], tags: Mapping[str, str]) -> RunRecorder:
        """Begin a new run of a trial; its id is MLflow's, or `local-...` if MLflow is away.

        Args:
            name: As for `search.tracking.client.Tracking.start_run`.
            config: The same.
            tags: The same.
        """
        record_id, start_ms = local_id(), _now_ms()
        own = {**run_tags(), **tags}
        if not self.outbox.runs():
            try:
                tracking = self.connect()
                experiment, parent = self._where(tracking)
                run_id = tracking.start_run(
                    experiment, parent, name=name, config=config, tags={**tags, RECORD_ID: record_id}
                )
                return RunRecorder(tracking, run_id, outbox=self.outbox)
            except Unavailable as error:
                log.warning("run %r begins in the outbox: %s", name, error)
        params = {key: as_text(value) for key, value in config.items()}
        self.outbox.append(record_id, [Create(name=name, params=params, tags=own, start_ms=start_ms)])
        return RunRecorder(None, record_id, outbox=self.outbox)

    def resume(self, run_id: str) -> RunRecorder:
        """Resume the run of a trial, whatever id it got when it began.

        A run that is resumed while MLflow is away is recorded in the outbox to its end: only MLflow knows what the run
        has, which the delivery leaves out.
        """
        if not self.outbox.runs():
            try:
                tracking = self.connect()
                self._where(tracking)
                found = tracking.resolve(self.study, run_id)
                tracking.resume_run(found)
                return tracking.recorder(found, outbox=self.outbox)
            except Unavailable as error:
                log.warning("run %s continues in the outbox: %s", run_id, error)
        self.outbox.append(run_id, [Resume(tags=here())])
        return RunRecorder(None, run_id, outbox=self.outbox)

    def end(self, run_id: str, status: Status, tags: Mapping[str, str]) -> None:
        """End the run of a trial that no recorder records."""
        self._write(run_id, End(status=status, tags=dict(tags), description="", end_ms=_now_ms()))

    # ------------------------------------------------------------------

    def _where(self, tracking: Tracking) -> tuple[str, str]:
        """Ids of the experiment and of the study's run, asked for once."""
        if self._place is None:
            self._place = (tracking.experiment(self.study), tracking.some_parent(self.study, {}))
        return self._place

    def _write(self, run_id: str, entry: End | File | Write | Model) -> None:
        if not self.outbox.runs():
            try:
                tracking = self.connect()
                target = self._where(tracking)[1] if run_id == STUDY else tracking.resolve(self.study, run_id)
                match entry:
                    case File():
                        tracking.log_artifact(target, Path(entry.path), entry.folder)
                    case _:
                        send(tracking, target, entry)
                return
            except Unavailable as error:
                log.warning("run %s: %s", run_id, error)
        self._append_once(run_id, entry)

    def _append_once(self, run_id: str, entry: Entry) -> None:
        """Keep an entry; a file only once, since it is delivered as it is at that time."""
        if isinstance(entry, File | Model) and any(kept.entry == entry for kept in self.outbox.read(run_id)):
            return
        self.outbox.append(run_id, [entry])


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _end_as(tracking: Tracking, run_id: str, trial: records.TrialRecord) -> None:
    """End a run as its trial ended, unless it says so; what a person wrote on its page stays."""
    tags = tracking.tags(run_id)
    if (tags.get("state"), tags.get("reason")) == (trial.state, trial.reason):
        return
    known = [Finding.from_dict(each) for each in trial.attrs.get(records.FINDINGS) or ()]
    how = judgement.description(trial.state, trial.reason, trial.detail, known)
    ours = judgement.is_ours(tags.get(NOTE, ""))
    tracking.end_run(run_id, run_status(trial.state, trial.reason), {}, how if ours else "")
    # The state last: by it the run is found again if this fails half-way.
    tracking.write(run_id, (), {"state": trial.state, **({"reason": trial.reason} if trial.reason else {})})
