"""One trial, from its params to its final state: report, judge, record, tell. The worker's pack trains it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from search import diagnosis, leaderboard, pruning, records
from search.dashboards import notes
from search.diagnosis import messages
from search.errors import DatabaseAway, StorageError
from search.markdown import escape
from search.pruning import Verdict
from search.sampling import samplers, staged
from search.storage import lifecycle
from search.tracking.address import run_page
from search.tracking.client import run_status
from search.tracking.outbox import is_local
from search.workers.protocol import EpochDone, Notice, Order, StepDone, TrialEnded, TrialStarted
from trainer.events import Diverged, EpochEnded, Event, OutOfMemory, RunStarted, StepEnded
from trainer.loop import history_of

if TYPE_CHECKING:
    from search.tracking.recorder import RunRecorder
    from search.workers.worker import Worker

log = logging.getLogger("search.workers.trial")

SHOW_EVERY_S = 0.5
"""Steps are shown at most this often."""
COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#000000",
    "#8c510a",
    "#762a83",
    "#a6761d",
)
"""Colours of runs in MLflow's charts, which by itself gave two of five trials the same."""
FOLDER = "folder"
"""User attribute: the trial's folder below the study's; one that resumes another's work shares it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended. `state` is Optuna's, or WAITING for a trial that goes on later."""

    state: str
    reason: str
    detail: str
    violated: str | None = None
    """The constraint it violated: TPE sees it, and keeps away (a FAIL would be invisible to it)."""
    stopped_early: bool = False


def fail(trial: optuna.Trial, worker: Worker, detail: str) -> None:
    """Tell a trial as FAIL because of a fault, and end its MLflow run if it has one."""
    trial.set_user_attr(records.REASON, records.ERROR)
    trial.set_user_attr(records.DETAIL, detail)
    worker.study.tell(trial, state=TrialState.FAIL)
    run_id = trial.user_attrs.get(records.RUN_ID)
    if run_id:
        tags = {"state": "FAIL", "reason": records.ERROR, "detail": detail}
        worker.book.end(run_id, run_status("FAIL"), tags)


class TrialRun:
    """The state of one trial while it runs."""

    def __init__(self, trial: optuna.Trial, worker: Worker) -> None:
        self.trial = trial
        self.worker = worker
        self.study = worker.study
        overrides = {**trial.user_attrs.get(records.OVERRIDES, {}), **staged.stage_overrides(trial)}
        self.config = worker.job.study.config(trial.params, overrides)
        self.events: list[Event] = []
        self.train_losses: list[float] = list(trial.user_attrs.get(records.TRAIN_LOSSES, ()))
        self.reported = dict(self._frozen().intermediate_values)
        self.began = time.monotonic()
        self.total_steps = 0
        self.last_shown = 0.0
        self.findings: tuple[diagnosis.Finding, ...] = ()
        self.folder = Path()
        self.recorder: RunRecorder | None = None
        self.failed = False
        self.taken_over = False
        """Whether the storage says that it was finished, though not here: this host was taken for lost."""

    def begin(self) -> Outcome | None:
        """Record what is run, open its MLflow run, and take in what its checkpoint remembers.

        Returns:
            The outcome, if nothing is left to train.
        """
        self.folder = self._prepare()
        self.recorder = self._start_tracking()
        history = history_of(self.config, self.folder)
        self.worker.link.send(
            TrialStarted(
                number=self.trial.number,
                config=self.config.model_dump(mode="json"),
                label=self.trial.user_attrs.get(records.LABEL),
                resumed_from_epoch=len(history),
            )
        )
        for epoch in history:  # nothing an epoch measured is lost, should its report have been
            self.recorder(epoch)
            outcome = self._epoch(epoch, from_checkpoint=True)
            if outcome is not None:
                return outcome
        return self._finished() if len(history) >= self.config.num_epochs else None

    def take(self, event: Event) -> Outcome | None:
        """Record an event; the outcome if it ends the trial."""
        assert self.recorder is not None
        self.recorder(event)
        return self._event(event)

    def park(self) -> Outcome:
        """The outcome of a trial that goes on later, from its checkpoint."""
        return self._interrupted()

    def hand_over(self) -> Outcome:
        """The outcome of a trial that goes on at once in another worker."""
        detail = f"goes on in another worker after epoch {len(self.reported)}"
        return Outcome(state="WAITING", reason=records.INTERRUPTED, detail=detail)

    def left_s(self) -> float:
        """Seconds that are left to train, by its last epoch."""
        epochs = [event for event in self.events if isinstance(event, EpochEnded)]
        return (self.config.num_epochs - epochs[-1].epoch) * epochs[-1].timing.epoch_s if epochs else math.inf

    def finish(self, outcome: Outcome) -> None:
        """Tell Optuna, MLflow and the supervisor how it ended."""
        told: Outcome | None = None
        try:
            self._tell(outcome)
            told = outcome
        except DatabaseAway:
            told = self.park()
            raise
        finally:
            self._end_tracking(told)
        self._announce(outcome)

    def leave(self) -> None:
        """End its MLflow run as interrupted, where Optuna's database cannot be told; it goes on another time."""
        if self.recorder is not None:
            self._end_tracking(self.park())

    def fail(self, detail: str) -> None:
        """Tell the trial as FAIL because of a fault, and end its MLflow run if it has one."""
        self.failed = True
        if self.recorder is not None:
            self._end_tracking(None)
        fail(self.trial, self.worker, detail)

    def let_go(self) -> None:
        """End a trial that another process has taken over: nothing more is told about it but to MLflow."""
        self.failed = True
        try:
            if self.recorder is not None:
                self.recorder.finish(run_status("FAIL", records.LOST), state="FAIL", reason=records.LOST)
        except StorageError:
            log.exception("trial %d: its run could not be ended", self.trial.number)

    def _prepare(self) -> Path:
        """Record what is run, and where its files lie."""
        attrs = self.trial.user_attrs
        self.trial.set_user_attr(records.CONFIG, self.config.model_dump(mode="json"))
        self.trial.set_user_attr(records.SLOTS, self.worker.slots.most)
        name = attrs.get(FOLDER)
        if name is None:
            resumed = records.RESUMES in attrs  # without it, there is no need to read the trials
            first = lifecycle.lineage(self.study, self.trial.number)[-1] if resumed else self.trial.number
            name = f"trials/{first:04d}"
            self.trial.set_user_attr(FOLDER, name)
        folder: Path = self.worker.job.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config.model_dump(mode="json"), indent=1)
        (folder / "config.json").write_text(text, encoding="utf-8")
        return folder

    def _start_tracking(self) -> RunRecorder:
        book = self.worker.book
        run_id = self.trial.user_attrs.get(records.RUN_ID)
        if run_id is not None:
            recorder = book.go_on(run_id)
        else:
            name = self.worker.job.study_name
            colour = COLOURS[self.trial.number % len(COLOURS)]
            tags = {"trial": str(self.trial.number), "study": name, "mlflow.runColor": colour}
            for key in (records.LABEL, records.STAGE, records.RESUMES, records.ATTEMPT, records.SLOTS):
                if key in self.trial.user_attrs:
                    tags[key] = str(self.trial.user_attrs[key])
            recorder = book.begin(self._name(), self.config.model_dump(), tags)
        if recorder.run_id != run_id:
            self.trial.set_user_attr(records.RUN_ID, recorder.run_id)
        return recorder

    def _name(self) -> str:
        """The run's name: legends of MLflow's charts show nothing else, so it holds what tells trials apart."""
        label = self.trial.user_attrs.get(records.LABEL)
        config = self.config
        rate = leaderboard.show_value("learning_rate", config.learning_rate)
        what = f"lr={rate} r={config.lora_r} a={config.lora_alpha:g} b={config.batch_size}"
        return f"trial {self.trial.number:03d}" + (f" ({label})" if label else "") + f" {what}"

    def _event(self, event: Event) -> Outcome | None:
        """Take one event in; the outcome if it ends the trial."""
        if not isinstance(event, EpochEnded):
            self.events.append(event)
        match event:
            case RunStarted():
                self.total_steps = event.total_steps
                facts = replace(event, adapted_modules=())  # MLflow has their names
                log.info("trial %d: %s, %d modules", self.trial.number, facts, len(event.adapted_modules))
                for problem in event.damaged_checkpoints:
                    text = f"trial {self.trial.number} goes on after epoch {event.resumed_from_epoch}: {problem}"
                    self.worker.link.send(Notice(text=text))
            case StepEnded():
                self._show(event)
                if self.worker.link.order() == Order.END_NOW:
                    return self._interrupted()
            case EpochEnded():
                outcome = self._epoch(event, from_checkpoint=False)
                if outcome is not None:
                    return outcome
                if event.epoch >= self.config.num_epochs:
                    return self._finished()
                if self.worker.link.order() >= Order.END_AFTER_EPOCH:
                    return self._interrupted()
            case Diverged():
                cause = event.cause
                detail = f"step {event.first_bad_step}: {cause.tensor} is {cause.value}; {cause.detail}"
                return self._constrained(records.NON_FINITE, detail)
            case OutOfMemory():
                return self._constrained(records.OUT_OF_MEMORY, f"step {event.step}: {event.detail}")
        return None

    def _epoch(self, event: EpochEnded, *, from_checkpoint: bool) -> Outcome | None:
        """Report an epoch and ask the pruner; the outcome if it ends the trial."""
        self.events.append(event)
        if event.epoch > len(self.train_losses):
            self.train_losses.append(event.train_loss)
            # Before the report, so that whoever sees the epoch has both of its losses. NaN is no JSON.
            safe = [loss if math.isfinite(loss) else None for loss in self.train_losses]
            self.trial.set_user_attr(records.TRAIN_LOSSES, safe)
        if event.epoch not in self.reported:
            self.trial.report(event.val_loss, event.epoch)
            self.reported[event.epoch] = event.val_loss
        self.worker.link.send(
            EpochDone(
                number=self.trial.number,
                epoch=event.epoch,
                train_loss=event.train_loss,
                val_loss=event.val_loss,
                learning_rate=event.learning_rate,
                epoch_s=event.timing.epoch_s,
                from_checkpoint=from_checkpoint,
            )
        )
        if event.epoch >= self.config.num_epochs:
            return None  # it has had all its epochs: nothing is left to save
        verdict = pruning.verdict(self.study, self._frozen())
        return self._judged(verdict) if verdict else None

    def _judged(self, verdict: Verdict) -> Outcome:
        if verdict.reason == records.NON_FINITE:
            return self._constrained(verdict.reason, verdict.detail)
        early = verdict.state == "COMPLETE"
        return Outcome(state=verdict.state, reason=verdict.reason, detail=verdict.detail, stopped_early=early)

    def _finished(self) -> Outcome:
        """All epochs are done."""
        if staged.is_probe(self.trial):
            return Outcome(state="PRUNED", reason=records.PROBE, detail="the probe of stability came through")
        if self._best() is None:
            return self._constrained(records.NON_FINITE, "no epoch had a finite validation loss")
        return Outcome(state="COMPLETE", reason=records.FINISHED, detail=f"{self.config.num_epochs} epochs done")

    def _constrained(self, reason: str, detail: str) -> Outcome:
        return Outcome(state="PRUNED", reason=reason, detail=detail, violated=reason)

    def _interrupted(self) -> Outcome:
        return Outcome(state="WAITING", reason=records.INTERRUPTED, detail=f"after epoch {len(self.reported)}")

    def _best(self) -> tuple[float, int] | None:
        """(lowest finite validation loss, its epoch)."""
        finite = [(loss, epoch) for epoch, loss in self.reported.items() if math.isfinite(loss)]
        return min(finite) if finite else None

    def _tell(self, outcome: Outcome) -> None:
        """The outcome as Optuna's. Attributes first: a finished trial takes none."""
        if outcome.state == "WAITING":
            lifecycle.park(self.study, self.trial)
            return
        best = self._best()
        curve = diagnosis.curve_from_events(self.config, self.events, reason=outcome.reason)
        self.findings = diagnosis.diagnose(curve)
        self.trial.set_user_attr(records.REASON, outcome.reason)
        self.trial.set_user_attr(records.DETAIL, outcome.detail)
        self.trial.set_user_attr(records.FINDINGS, [finding.to_dict() for finding in self.findings])
        if outcome.stopped_early:
            self.trial.set_user_attr(records.STOPPED_EARLY, True)
        if best is not None:
            self.trial.set_user_attr(records.BEST_EPOCH, best[1])
        samplers.mark_constraints(self.trial, outcome.violated)
        self._annotate(outcome, curve.epochs)
        if outcome.state == "COMPLETE":
            assert best is not None
            self.study.tell(self.trial, best[0], state=TrialState.COMPLETE)
        else:
            self.study.tell(self.trial, state=TrialState.PRUNED)

    def _annotate(self, outcome: Outcome, epochs: Sequence[records.EpochRecord]) -> None:
        """The trial's note and plot on optuna-dashboard."""
        try:
            notes.annotate_trial(
                self.trial,
                runs_dir=self.worker.job.runs_dir,
                outcome=outcome,
                findings=self.findings,
                epochs=epochs,
                config=self.config.model_dump(mode="json"),
                run=self._page(),
            )
        except Exception:  # a note is worth no trial
            log.exception("trial %d: its note could not be written", self.trial.number)

    def _page(self) -> str | None:
        """Address of the run's page in MLflow, None if MLflow was away when it began."""
        assert self.recorder is not None
        experiment, run_id = self.worker.book.experiment_id(), self.recorder.run_id
        if experiment is None or is_local(run_id):
            return None
        return run_page(notes.pages_of(self.worker.job.tracking_uri), experiment, run_id)

    def _end_tracking(self, outcome: Outcome | None) -> None:
        """End the MLflow run, whatever happened. What cannot be recorded of it costs no trial: it is told."""
        assert self.recorder is not None
        try:
            self._finish_recorder(outcome)
        except StorageError as error:
            log.error("trial %d: %s", self.trial.number, error)
            self.worker.link.send(Notice(text=f"trial {self.trial.number}: {error}"))

    def _finish_recorder(self, outcome: Outcome | None) -> None:
        recorder = self.recorder
        assert recorder is not None
        if outcome is None:  # an exception is on its way; `fail` tells it
            recorder.finish(run_status("FAIL"), state="FAIL", reason=records.ERROR)
            return
        best = self._best()
        tags = {"detail": outcome.detail}
        if best is not None:
            tags["best_epoch"] = str(best[1])
            # MLflow sorts runs by a metric's last value, and val_loss' last is not its best.
            recorder.put_metric("best_val_loss", best[0], best[1])
        recorder.finish(
            run_status(outcome.state, outcome.reason),
            state=outcome.state,
            reason=outcome.reason,
            findings=[finding.id for finding in self.findings],
            tags=tags,
            description=self._description(outcome),
        )

    def _description(self, outcome: Outcome) -> str:
        """Markdown for the run's page: how it ended, and each finding with its evidence."""
        lines = [f"**{outcome.state}** ({outcome.reason}): {escape(outcome.detail)}", ""]
        lines += [f"- `{finding.id}`: {escape(messages.sentence(finding))}" for finding in self.findings]
        return "\n".join(lines)

    def _announce(self, outcome: Outcome) -> None:
        best = self._best()
        self.worker.link.send(
            TrialEnded(
                number=self.trial.number,
                state=outcome.state,
                reason=outcome.reason,
                detail=outcome.detail,
                value=best[0] if best else None,
                findings=tuple(finding.id for finding in self.findings),
                elapsed_s=time.monotonic() - self.began,
            )
        )

    def _show(self, event: StepEnded) -> None:
        now = time.monotonic()
        if now - self.last_shown < SHOW_EVERY_S:
            return
        self.last_shown = now
        self.worker.link.send(
            StepDone(
                number=self.trial.number,
                step=event.step,
                total_steps=self.total_steps,
                epoch=event.epoch,
                loss=event.loss,
                learning_rate=event.learning_rate,
            )
        )

    def _frozen(self) -> Any:
        """The trial as the storage has it: this process alone writes to it, and Optuna keeps what it wrote."""
        return self.trial._get_latest_trial()
