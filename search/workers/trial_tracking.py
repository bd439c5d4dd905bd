"""A trial's MLflow run: its name and colour, and how it ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import optuna

from search import captions, colours, diagnosis, leaderboard, records
from search.errors import StorageError
from search.records import Outcome
from search.tracking import judgement
from search.tracking.gpu_metrics import GpuMetrics, GpuWatch
from search.tracking.outbox import File
from search.tracking.pages import pages_of, run_page
from search.tracking.recorder import run_status
from search.tracking.runs import StudyRuns
from search.workers.protocol import Job, Link, Notice
from trainer.config import TrainConfig
from trainer.events import Event

if TYPE_CHECKING:
    from search.captions import Captioned
    from search.tracking.recorder import RunRecorder
    from search.workers.captioning import Captioning
    from trainer.workbench import Workbench

TAGGED = (
    *(records.LABEL, records.STAGE, records.RESUMES, records.ATTEMPT, records.SLOTS),
    *(records.REPEAT_OF, records.BLOCK),
)
"""User attributes that are also tags of the run."""

LOGGED_TABLES = "mlflow.loggedArtifacts"
"""Tag by which MLflow's pages find the tables among a run's artifacts."""

log = logging.getLogger("search.workers.trial_tracking")


@dataclass(frozen=True, kw_only=True)
class TrialContext:
    """What a trial is part of, and whom it reports to."""

    study: optuna.Study
    job: Job
    runs: StudyRuns
    link: Link
    slots: int = 1
    """Trials that its worker trains at once; recorded with it."""
    check: Callable[[], None] = lambda: None
    """Raises StudyGone if the study is not there any more: its number may be another's by then."""
    captioning: Captioning | None = None
    """Captions a few images with each trial that completes; None for no captions."""
    owner: str | None = None
    """The study's own id, which the checkpoints have; None takes up those of any study."""
    gpus: GpuWatch | None = None
    """Watches the worker's GPUs; None without any."""
    bench: Workbench | None = None
    """The worker's, for what captions of all validation images score."""


class TrialTracking:
    """The MLflow run of one trial. What MLflow does not take is reported, and costs no trial."""

    def __init__(self, trial: optuna.Trial, config: TrainConfig, context: TrialContext) -> None:
        self._trial = trial
        self._config = config
        self._context = context
        self._recorder: RunRecorder | None = None

    def begin(self) -> None:
        """Begin the run, or resume the one that the trial has."""
        runs = self._context.runs
        run_id = self._trial.user_attrs.get(records.RUN_ID)
        if run_id is not None:
            recorder = runs.resume(run_id)
        else:
            study = self._context.job.study_name
            tags = {
                "trial": str(self._trial.number),
                "study": study,
                "mlflow.runColor": colours.of_trial(self._trial.number),
            }
            tags |= {key: str(self._trial.user_attrs[key]) for key in TAGGED if key in self._trial.user_attrs}
            tags |= {name: str(value) for name, value in self._context.job.study.stop_rule().items()}
            recorder = runs.begin(self._name(), self._config.model_dump(), tags)
        if recorder.run_id != run_id:
            self._trial.set_user_attr(records.RUN_ID, recorder.run_id)
        if self._context.gpus is not None:
            recorder.gpus = GpuMetrics(self._context.gpus)
        self._recorder = recorder

    def record(self, event: Event) -> None:
        """Record an event."""
        assert self._recorder is not None
        self._recorder(event)

    def end(
        self,
        outcome: Outcome,
        best: tuple[float, int] | None = None,
        findings: Sequence[diagnosis.Finding] = (),
        cider: float | None = None,
    ) -> None:
        """End the run, if there is one. One that has ended already is corrected: Optuna did not take its trial's end.

        Args:
            outcome: How the trial ended.
            best: (lowest finite validation loss, its epoch).
            findings: About the trial.
            cider: CIDEr-D of that epoch's captions, where the study ranks by it.
        """
        if self._recorder is None:
            return
        tags = {"detail": outcome.detail}
        try:
            if self._recorder.finished:
                self._correct({"state": outcome.state, "reason": outcome.reason, **tags})
                return
            if best is not None:
                tags["best_epoch"] = str(best[1])
                # MLflow sorts runs by a metric's last value, and val_loss' last is not its best.
                self._recorder.put_metric("best_val_loss", best[0], best[1])
                if cider is not None:
                    self._recorder.put_metric(records.VAL_CIDER, cider, best[1])
            self._recorder.finish(
                run_status(outcome.state, outcome.reason),
                state=outcome.state,
                reason=outcome.reason,
                findings=findings,
                tags=tags,
                description=judgement.description(outcome.state, outcome.reason, outcome.detail, findings),
            )
        except StorageError as error:
            self._report(error)

    def end_by_fault(self) -> None:
        """End the run, if there is one, because of an exception; `fail` adds the detail later."""
        try:
            self._fail(records.ERROR)
        except StorageError as error:
            self._report(error)

    def fail(self, detail: str) -> None:
        """Say in the run, if the trial has one, what its fault was."""
        run_id = self._trial.user_attrs.get(records.RUN_ID)
        if run_id:
            tags = {"state": "FAIL", "reason": records.ERROR, "detail": detail}
            self._context.runs.end(run_id, run_status("FAIL"), tags)

    def end_as_lost(self) -> None:
        """End the run, if there is one, of a trial that another process has taken over."""
        try:
            self._fail(records.LOST)
        except StorageError:
            log.exception("trial %d: its run could not be ended", self._trial.number)

    def _fail(self, reason: str) -> None:
        """End the run as FAIL, if there is one, also one that has ended in another way."""
        if self._recorder is not None and self._recorder.finished:
            self._correct({"state": "FAIL", "reason": reason})
        elif self._recorder is not None:
            self._recorder.finish(run_status("FAIL", reason), state="FAIL", reason=reason)

    def _correct(self, tags: Mapping[str, str]) -> None:
        """End a run that has ended in another way."""
        assert self._recorder is not None
        self._context.runs.end(self._recorder.run_id, run_status(tags["state"], tags["reason"]), tags)

    def caption(self, said: Captioned) -> None:
        """Keep captions with the run: an artifact table with the images, and a page."""
        assert self._recorder is not None
        title = f"{self._context.job.study_name}, trial {self._trial.number}"
        names = [f"images/{file.name}" for file in said.files]
        texts = {
            captions.TABLE: captions.table(said.pictured, said.captions, names),
            captions.PAGE: captions.page(said.pictured, said.captions, said.pictures, title),
        }
        tags = {LOGGED_TABLES: json.dumps([{"path": captions.TABLE, "type": "table"}])}
        files = [File(path=str(file.absolute()), folder="images") for file in said.files]
        self._recorder.writer.put(tags=tags, texts=texts, others=files)

    def page(self) -> str | None:
        """Address of the run's page in MLflow, None if MLflow was away when it began."""
        assert self._recorder is not None
        server = pages_of(self._context.job.places.tracking_uri)
        return run_page(server, self._context.runs.experiment_id(), self._recorder.run_id)

    @property
    def label(self) -> str | None:
        """What the trial is called beside its number: its label, or what it repeats with which seed."""
        attrs = self._trial.user_attrs
        if records.REPEAT_OF in attrs:
            return f"repeat of {attrs[records.REPEAT_OF]}, seed {self._config.seed}"
        return attrs.get(records.LABEL)

    def _name(self) -> str:
        """The run's name: legends of MLflow's charts show nothing else, so it holds what tells trials apart."""
        label = self.label
        config = self._config
        rate = leaderboard.show_value("learning_rate", config.learning_rate)
        what = f"lr={rate} r={config.lora_r} a={config.lora_alpha:g} b={config.batch_size}"
        place = records.place_of(self._trial.user_attrs, self._trial.number) or 1
        again = f"-{place}" if place > 1 else ""  # MLflow still has the run of the deleted trial of this number
        return f"trial {self._trial.number:03d}{again}" + (f" ({label})" if label else "") + f" {what}"

    def _report(self, error: StorageError) -> None:
        log.error("trial %d: %s", self._trial.number, error)
        self._context.link.send(Notice(text=f"trial {self._trial.number}: {error}"))
