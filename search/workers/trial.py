"""One trial, from its params to its final state: report, judge, record, tell. The worker's pack trains it.

    begin -> take, for each event -> end        tells Optuna, MLflow and the supervisor how it ended
                                  -> abandon    Optuna's database is away, or another process has taken the trial over:
                                                tells MLflow, and of the latter the supervisor

`begin` and `take` return the outcome once there is one; the worker then calls `end`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from search import captions, diagnosis, pruning, records
from search.captions import Captioned
from search.dashboards import notes
from search.diagnosis import messages
from search.diagnosis.noise import relative
from search.errors import DatabaseAway
from search.records import Outcome
from search.sampling import params
from search.storage import lifecycle, optuna_private
from search.storage.searched import alike, searched
from search.verdict.leaders import APART
from search.workers import folders
from search.workers.protocol import Notice, Order, Progress, TrialEnded, TrialStarted
from search.workers.scoring import cider_of
from search.workers.trial_tracking import TrialContext, TrialTracking
from trainer.checkpoint import folder_of
from trainer.events import Diverged, EpochEnded, Event, OutOfMemory, RunStarted, StepEnded
from trainer.loop import history_of

log = logging.getLogger("search.workers.trial")

SHOW_EVERY_S = 0.5
"""Least seconds between two steps of a trial that are sent to be shown."""


class TrialRun:
    """The state of one trial while it runs."""

    def __init__(self, trial: optuna.Trial, context: TrialContext) -> None:
        self.trial = trial
        self.study = context.study
        self.config = context.job.study.config(trial.params, trial.user_attrs.get(records.OVERRIDES))
        self.repeat_of: int | None = trial.user_attrs.get(records.REPEAT_OF)
        """Number of the trial that this one repeats, with another seed: nothing stops it before its last epoch."""
        self.last_epoch: int = trial.user_attrs.get(records.TRAINS_TO, self.config.num_epochs)
        self.folder = Path()
        self._search = searched(context.study)
        """The study as the pruner is to see it."""
        self.over = False
        """Whether nothing more is to be done for it here. A trial whose end could not be recorded is not over."""
        self.taken_over = False
        """Whether the storage says that another process has ended it: this host was taken for lost."""
        self._context = context
        self._tracking = TrialTracking(trial, self.config, context)
        self._events: list[Event] = []
        self._train_losses: list[float] = list(trial.user_attrs.get(records.TRAIN_LOSSES, ()))
        self._reported = dict(self._frozen().intermediate_values)
        self._began = time.monotonic()
        self._last_shown = 0.0
        self._findings: tuple[diagnosis.Finding, ...] = ()
        self._captioned: Captioned | None = None
        self._cider: float | None = None
        """What it is ranked by, if its study ranks by CIDEr-D and it is complete."""

    def begin(self) -> Outcome | None:
        """Record what is run, open its MLflow run, and take in what its checkpoint remembers.

        Returns:
            The outcome, if nothing is left to train.
        """
        self.folder = self._prepare()
        self._tracking.begin()
        history = history_of(self.config, self.folder, self._context.owner)
        self._context.link.send(
            TrialStarted(
                number=self.trial.number,
                config=self.config.model_dump(mode="json"),
                label=self._tracking.label,
                resumed_from_epoch=len(history),
            )
        )
        for epoch in history:  # nothing an epoch measured is lost, should its report have been
            self._tracking.record(epoch)
            outcome = self._epoch(epoch, from_checkpoint=True)
            if outcome is not None and (outcome.reason != records.PAUSED or self._may_pause_at(epoch, history)):
                return self._scored(outcome)
        if records.GIVEN_UP in self.trial.user_attrs:
            return pruning.settled(self.study, self._frozen(), self.trial.user_attrs[records.GIVEN_UP])
        return self._scored(self._finished()) if len(history) >= self.last_epoch else None

    def take(self, event: Event) -> Outcome | None:
        """Record an event and judge it; the outcome if it ends the trial."""
        self._tracking.record(event)
        if not isinstance(event, EpochEnded):
            self._events.append(event)
        match event:
            case RunStarted():
                self._started(event)
            case StepEnded():
                self._show(event)
                if self._context.link.order() == Order.END_NOW:
                    return self.interrupted()
            case EpochEnded():
                outcome = self._epoch(event, from_checkpoint=False)
                if outcome is not None:
                    return self._scored(outcome)
                if event.epoch >= self.last_epoch:
                    return self._scored(self._finished())
                if self._context.link.order() >= Order.END_AFTER_EPOCH:
                    return self.interrupted()
            case Diverged():
                cause = event.cause
                detail = f"step {event.first_bad_step}: {cause.tensor} is {cause.value}; {cause.detail}"
                return _constrained(records.NON_FINITE, detail)
            case OutOfMemory():
                return _constrained(records.OUT_OF_MEMORY, f"step {event.step}: {event.detail}")
        return None

    def end(self, outcome: Outcome) -> None:
        """Tell MLflow, Optuna and the supervisor how the trial ended, or that it waits to be resumed.

        MLflow first: a process that is killed in between leaves a trial that is taken up again, and whose run is ended
        as lost. The other way round nobody would come back for what MLflow had not been told.

        A FAIL is of a fault, about which the worker sends a notice of its own, before this. Its MLflow run is ended
        first, and the trial counts as over however much of that succeeds.

        Raises:
            DatabaseAway: it does not answer; the MLflow run has been ended as interrupted.
        """
        if outcome.state == "FAIL":
            self.over = True
            self._tracking.end_by_fault()
            self._tell_fault(outcome)
            self._tracking.fail(outcome.detail)
            self._announce(outcome)
            return
        try:
            self._tell(outcome)
        except DatabaseAway:
            self._tracking.end(self.interrupted(), self._best(), self._findings)
            raise
        except BaseException:  # the worker ends it as FAIL next, unless a disk is full
            self._tracking.end_by_fault()
            raise
        if outcome.state == "WAITING":
            self._tracking.end(outcome, self._best(), self._findings)
        self._announce(outcome)
        self.over = True

    def abandon(self, reason: str) -> None:
        """End only the MLflow run, if it has begun: Optuna's trial is left as it is. The supervisor hears of a loss.

        Args:
            reason: `records.INTERRUPTED` if Optuna's database is away: the trial is resumed another time.
                `records.LOST` if another process has taken the trial over.
        """
        assert reason in (records.INTERRUPTED, records.LOST)
        if reason == records.LOST:
            self.over = True
            self._tracking.end_as_lost()
            self._announce(Outcome(state="FAIL", reason=records.LOST, detail="taken over by another process"))
        else:
            self._tracking.end(self.interrupted(), self._best(), self._findings)

    def interrupted(self, how: str = "") -> Outcome:
        """The outcome of a trial that is resumed later, from its checkpoint."""
        detail = f"{how}after epoch {len(self._reported)}"
        return Outcome(state="WAITING", reason=records.INTERRUPTED, detail=detail)

    def left_s(self) -> float:
        """Seconds that are left to train, by its last epoch."""
        epochs = [event for event in self._events if isinstance(event, EpochEnded)]
        return (self.last_epoch - epochs[-1].epoch) * epochs[-1].timing.epoch_s if epochs else math.inf

    def _prepare(self) -> Path:
        """Record what is run, and where its files lie."""
        self.trial.set_user_attr(records.CONFIG, self.config.model_dump(mode="json"))
        self.trial.set_user_attr(records.SLOTS, self._context.slots)
        self.trial.set_user_attr(records.STOP_RULE, self._context.job.study.stop_rule())
        folder = folders.claim(self.study, self.trial, self._context.job.folder)
        text = json.dumps(self.config.model_dump(mode="json"), indent=1)
        (folder / "config.json").write_text(text, encoding="utf-8")
        return folder

    def _started(self, event: RunStarted) -> None:
        facts = replace(event, adapted_modules=(), data_lines=())  # MLflow has their names, the log's head the data
        log.info("trial %d: %s, %d modules", self.trial.number, facts, len(event.adapted_modules))
        self._send(replace(facts, skipped_rows=()))
        for problem in event.damaged_checkpoints:
            text = f"trial {self.trial.number} resumes after epoch {event.resumed_from_epoch}: {problem}"
            self._context.link.send(Notice(text=text))

    def _epoch(self, event: EpochEnded, *, from_checkpoint: bool) -> Outcome | None:
        """Report an epoch and ask the pruner; the outcome if it ends the trial."""
        # Report.
        self._events.append(event)
        if event.epoch > len(self._train_losses):
            self._train_losses.append(event.train_loss)
            # Before the report, so that whoever sees the epoch has both of its losses. JSON has no NaN.
            safe = [loss if math.isfinite(loss) else None for loss in self._train_losses]
            self._context.check()
            self.trial.set_user_attr(records.TRAIN_LOSSES, safe)
        if event.epoch not in self._reported:
            self.trial.report(event.val_loss, event.epoch)
            self._reported[event.epoch] = event.val_loss
        self._send(event, from_checkpoint=from_checkpoint)
        # Judge.
        if self.judged_before(event.epoch) or event.epoch >= self.last_epoch or self.repeat_of is not None:
            return None  # it has had all its epochs, or is to have them: nothing is left to save
        frozen = self._frozen()
        return pruning.verdict(self._search, frozen, lambda: alike(self.study, frozen))

    def judged_before(self, epoch: int) -> bool:
        """Whether a later epoch was reported: a trial whose last checkpoint is damaged trains epochs again.

        A plan that looks at the latest report would pause it before it comes there, each time it goes on.
        """
        latest: int = max(self._reported)
        return epoch < latest

    def _may_pause_at(self, epoch: EpochEnded, history: Sequence[EpochEnded]) -> bool:
        """Whether a trial that goes on from its checkpoint may pause there: only if it ended before it could."""
        return epoch is history[-1] and self.trial.user_attrs.get(records.PAUSED_AT) != epoch.epoch

    def _finished(self) -> Outcome:
        """The outcome of a trial that has had all its epochs."""
        if self._best() is None:
            return _constrained(records.NON_FINITE, "no epoch had a finite validation loss")
        if self.repeat_of is not None:
            detail = f"trial {self.repeat_of} again to its best epoch, {self.last_epoch}, with another seed"
            return Outcome(state="PRUNED", reason=records.REPEAT, detail=detail)
        return Outcome(state="COMPLETE", reason=records.FINISHED, detail=f"{self.config.num_epochs} epochs done")

    def _scored(self, outcome: Outcome) -> Outcome:
        """A complete trial with what its study ranks by, where that is CIDEr-D; it may be interrupted on the way."""
        best, bench = self._best(), self._context.bench
        if self._context.job.study.objective != "cider" or outcome.state != "COMPLETE" or bench is None:
            return outcome
        assert best is not None

        def go_on() -> bool:
            self._context.link.alive()  # captions of many images take minutes, which is not hanging
            return self._context.link.order() != Order.END_NOW

        found = cider_of(self.config, folder_of(self.folder, best[1]) / "adapter", bench, go_on)
        if found is None:
            return self.interrupted()
        cider, images = found
        self._cider = cider
        return replace(outcome, detail=f"{outcome.detail}; CIDEr-D {cider:.4f} of {images} validation images")

    def _best(self) -> tuple[float, int] | None:
        """(lowest finite validation loss, its epoch); of a repeat that has had its epochs, the loss after the last."""
        if self.repeat_of is not None and self.last_epoch in self._reported:
            loss = self._reported[self.last_epoch]
            return (loss, self.last_epoch) if math.isfinite(loss) else None
        finite = [(loss, epoch) for epoch, loss in self._reported.items() if math.isfinite(loss)]
        return min(finite) if finite else None

    def _tell(self, outcome: Outcome) -> None:
        """Tell Optuna the outcome, MLflow before that. Attributes first: a finished trial takes none."""
        self._context.check()
        if outcome.state == "WAITING":
            if outcome.reason == records.PAUSED:
                self.trial.set_user_attr(records.PAUSED_AT, max(self._reported))
            lifecycle.park(self.study, self.trial, outcome.reason)
            return
        best = self._best()
        curve = diagnosis.curve_from_events(self.config, self._events, reason=outcome.reason)
        self._findings = diagnosis.diagnose(curve)
        self.trial.set_user_attr(records.REASON, outcome.reason)
        self.trial.set_user_attr(records.DETAIL, outcome.detail)
        self.trial.set_user_attr(records.FINDINGS, [finding.to_dict() for finding in self._findings])
        if outcome.stopped_early:
            self.trial.set_user_attr(records.STOPPED_EARLY, True)
        if best is not None:
            self.trial.set_user_attr(records.BEST_EPOCH, best[1])
        if self._cider is not None:
            self.trial.set_user_attr(records.CIDER, self._cider)
        params.mark_constraints(self.trial, outcome.violated)
        self._caption(outcome)
        self._annotate(outcome, curve.epochs)
        self._tracking.end(outcome, best, self._findings, self._cider)
        if outcome.state == "COMPLETE":
            assert best is not None
            self._tell_state(TrialState.COMPLETE, best[0] if self._cider is None else -self._cider)
        else:
            self._tell_state(TrialState.PRUNED)

    def _tell_state(self, state: TrialState, value: float | None = None) -> None:
        """Tell Optuna a final state.

        Raises:
            UpdateFinishedTrialError: another process has taken the trial over in the last moment.
        """
        try:
            self.study.tell(self.trial, value, state=state)
        except ValueError as error:  # what `tell` says of a trial that is finished, and of wrong values
            if not lifecycle.heartbeat(self.study, self.trial):  # of the database; Optuna's memory does not know
                raise UpdateFinishedTrialError(str(error)) from error
            raise

    def _tell_fault(self, outcome: Outcome) -> None:
        self.trial.set_user_attr(records.REASON, outcome.reason)
        self.trial.set_user_attr(records.DETAIL, outcome.detail)
        self._tell_state(TrialState.FAIL)

    def _caption(self, outcome: Outcome) -> None:
        """Caption a few images with the best adapter, if the trial may be its study's winner."""
        captioning, best = self._context.captioning, self._best()
        if captioning is None or best is None or not self._may_win(outcome, best[0]):
            return
        trained_s = sum(event.timing.epoch_s for event in self._events if isinstance(event, EpochEnded))
        said = captioning.of(self.config, folder_of(self.folder, best[1]) / "adapter", trained_s)
        if said is not None:
            self._captioned = said
            self.trial.set_user_attr(captions.CAPTIONS, list(said.captions))
            self.trial.set_user_attr(captions.SECONDS, round(said.seconds, 4))
            self._tracking.caption(said)

    def _may_win(self, outcome: Outcome, value: float) -> bool:
        """Whether it is complete, or was paused and given up not clearly behind the best on its samples, see
        `leaders.leaders`."""
        if outcome.state == "COMPLETE" or records.GIVEN_UP not in self.trial.user_attrs:
            return outcome.state == "COMPLETE"
        complete = alike(self.study, self._frozen()).get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        values = [trial.value for trial in complete if records.finite(trial.value) and trial.value > 0]
        return not values or relative(value, min(values)) <= APART

    def _annotate(self, outcome: Outcome, epochs: Sequence[records.EpochRecord]) -> None:
        """Write the trial's note and plot for optuna-dashboard."""
        try:
            notes.annotate_trial(
                self.trial,
                folder=self._context.job.places.notes,
                outcome=outcome,
                findings=self._findings,
                epochs=epochs,
                config=self.config.model_dump(mode="json"),
                run=self._tracking.page(),
                captioned=self._captioned,
            )
        except Exception:  # a note is not worth a trial
            log.exception("trial %d: its note could not be written", self.trial.number)

    def _announce(self, outcome: Outcome) -> None:
        best = self._best()
        self._context.link.send(
            TrialEnded(
                number=self.trial.number,
                state=outcome.state,
                reason=outcome.reason,
                detail=outcome.detail,
                value=best[0] if best else None,
                findings=tuple(messages.key(finding) for finding in self._findings),
                elapsed_s=time.monotonic() - self._began,
            )
        )

    def _show(self, event: StepEnded) -> None:
        now = time.monotonic()
        if now - self._last_shown < SHOW_EVERY_S:
            return
        self._last_shown = now
        self._send(event)

    def _send(self, event: RunStarted | StepEnded | EpochEnded, *, from_checkpoint: bool = False) -> None:
        self._context.link.send(Progress(number=self.trial.number, event=event, from_checkpoint=from_checkpoint))

    def _frozen(self) -> Any:
        """The trial as the storage has it: this process alone writes to it, and Optuna keeps what it wrote."""
        return optuna_private.latest(self.trial)


def _constrained(reason: str, detail: str) -> Outcome:
    return Outcome(state="PRUNED", reason=reason, detail=detail, violated=reason)
