"""`StudyRuns`: the MLflow runs of a study as the search opens and ends them, whether or not MLflow answers.

What MLflow does not take goes to the spool, and `search.tracking.courier` delivers it. Nothing here waits longer for
MLflow than one call takes, and nothing raises because it is away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from search.errors import Unavailable
from search.tracking import client as store
from search.tracking.client import RECORD_ID, Tracking, as_text, here, run_tags
from search.tracking.outbox import FOLDER, STUDY, Create, End, Entry, File, Outbox, Resume, Study, local_id
from search.tracking.recorder import RunRecorder
from search.tracking.run_store import Status

log = logging.getLogger("search.tracking.runs")


class StudyRuns:
    """The runs of one study in one MLflow store. Each process has its own; they share the spool."""

    def __init__(self, uri: str, artifact_root: Path, study: str, folder: Path) -> None:
        """Opens nothing yet.

        Args:
            uri: As for `search.tracking.client.open_tracking`.
            artifact_root: The same.
            study: Name of the study, of its experiment and of its parent run.
            folder: The study's; the spool lies in it.
        """
        self.uri, self.study = uri, study
        self.spool = Outbox(folder / FOLDER)
        self._artifact_root = artifact_root
        self._tracking: Tracking | None = None
        self._place: tuple[str, str] | None = None

    def connect(self) -> Tracking:
        """The store, opened at the first call that finds it there.

        Raises:
            Unavailable: it does not answer.
            StorageError: it cannot be used.
        """
        if self._tracking is None:
            self._tracking = store.open_tracking(self.uri, self._artifact_root)
        return self._tracking

    def experiment_id(self) -> str | None:
        """Id of the study's experiment, None if MLflow has not told it yet."""
        return self._place[0] if self._place is not None else None

    # ------------------------------------------------------------------ the study's own run

    def start_study(self, tags: Mapping[str, str]) -> str | None:
        """The study's run is RUNNING. Returns why MLflow could not be told, None if it was.

        Raises:
            StorageError: the store cannot be used, for a reason that will not pass by itself.
        """
        try:
            if not self.spool.runs():
                self.connect().parent_run(self.study, tags)
                return None
            self.connect()
            why = None
        except Unavailable as error:
            why = str(error)
        self.spool.append(STUDY, [Study(tags={**run_tags(), **tags})])
        return why

    def end_study(self, status: Status, tags: Mapping[str, str]) -> None:
        """The study's run is over for now."""
        self._write(STUDY, End(status=status, tags=dict(tags), description="", end_ms=_now_ms()))

    def keep(self, path: Path, folder: str | None = None) -> None:
        """Keep a copy of a file with the study's run."""
        self._write(STUDY, File(path=str(path.absolute()), folder=folder))

    def close_dangling(self, is_dead: Callable[[Mapping[str, str]], bool]) -> None:
        """End the runs that dead processes left RUNNING; another time, if MLflow is away."""
        if self.spool.runs():
            return  # a run whose end is not delivered yet looks the same
        try:
            tracking = self.connect()
            tracking.close_dangling(tracking.experiment(self.study), is_dead)
        except Unavailable as error:
            log.warning("runs of dead processes not looked for: %s", error)

    # ------------------------------------------------------------------ runs of trials

    def begin(self, name: str, config: Mapping[str, Any], tags: Mapping[str, str]) -> RunRecorder:
        """A new run of a trial; its id is MLflow's, or `local-...` if MLflow is away.

        Args:
            name: As for `search.tracking.client.Tracking.start_run`.
            config: The same.
            tags: The same.
        """
        record_id, start_ms = local_id(), _now_ms()
        own = {**run_tags(), **tags}
        if not self.spool.runs():
            try:
                tracking = self.connect()
                experiment, parent = self._where(tracking)
                run_id = tracking.start_run(
                    experiment, parent, name=name, config=config, tags={**tags, RECORD_ID: record_id}
                )
                return RunRecorder(tracking, run_id, spool=self.spool)
            except Unavailable as error:
                log.warning("run %r begins in the spool: %s", name, error)
        params = {key: as_text(value) for key, value in config.items()}
        self.spool.append(record_id, [Create(name=name, params=params, tags=own, start_ms=start_ms)])
        return RunRecorder(None, record_id, spool=self.spool)

    def go_on(self, run_id: str) -> RunRecorder:
        """The run of a trial that is taken up again, whatever id it got when it began.

        One that goes on while MLflow is away stays with the spool to its end: what the run has is known only there,
        and the delivery leaves it out.
        """
        if not self.spool.runs():
            try:
                tracking = self.connect()
                self._where(tracking)
                found = tracking.resolve(self.study, run_id)
                tracking.resume_run(found)
                return tracking.recorder(found, spool=self.spool)
            except Unavailable as error:
                log.warning("run %s goes on in the spool: %s", run_id, error)
        self.spool.append(run_id, [Resume(tags=here())])
        return RunRecorder(None, run_id, spool=self.spool)

    def end(self, run_id: str, status: Status, tags: Mapping[str, str]) -> None:
        """End the run of a trial that no recorder is at."""
        self._write(run_id, End(status=status, tags=dict(tags), description="", end_ms=_now_ms()))

    # ------------------------------------------------------------------

    def _where(self, tracking: Tracking) -> tuple[str, str]:
        """(experiment, the study's run), asked once."""
        if self._place is None:
            self._place = (tracking.experiment(self.study), tracking.some_parent(self.study, {}))
        return self._place

    def _write(self, run_id: str, entry: End | File) -> None:
        if not self.spool.runs():
            try:
                tracking = self.connect()
                target = self._where(tracking)[1] if run_id == STUDY else tracking.resolve(self.study, run_id)
                if isinstance(entry, End):
                    tracking.end_run(target, entry.status, entry.tags, entry.description, entry.end_ms)
                else:
                    tracking.log_artifact(target, Path(entry.path), entry.folder)
                return
            except Unavailable as error:
                log.warning("run %s: %s", run_id, error)
        self._append_once(run_id, entry)

    def _append_once(self, run_id: str, entry: Entry) -> None:
        """A file is delivered as it is then: no need to be told of it twice."""
        if isinstance(entry, File) and any(kept.entry == entry for kept in self.spool.read(run_id)):
            return
        self.spool.append(run_id, [entry])


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
