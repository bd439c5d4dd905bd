"""A worker: loads the base model once and runs trials until none is left: ask, train, report, tell.

Trials go through it like this:

    trial_source --> held, if it cannot train beside those running --> running --> ended, or handed over
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError

from search import pruning, records
from search.errors import DatabaseAway
from search.processes import this_process
from search.records import Outcome
from search.sampling.make import FREEZE_THAW, make_sampler
from search.space import fits
from search.storage import lifecycle, studies
from search.storage.database import reopen_storage
from search.storage.identity import Watch
from search.storage.queue import LongestFirst
from search.tracking.gpu_metrics import GpuWatch
from search.tracking.runs import StudyRuns
from search.workers import slots
from search.workers.captioning import Captioning
from search.workers.hand_over import HandingOver
from search.workers.heartbeat import beating
from search.workers.protocol import Idle, Job, Link, Loading, Notice, Order, SlotsChosen
from search.workers.slots import Room, Slots
from search.workers.testing import Testing
from search.workers.trial import TrialRun
from search.workers.trial_source import Supply, TrialSource
from search.workers.trial_tracking import TrialContext
from trainer.common.disk import no_room, out_of_room
from trainer.common.errors import UserError
from trainer.events import Event
from trainer.loop import Pack, RunError
from trainer.member import Member
from trainer.model.base import fingerprint
from trainer.model.locate import fetch
from trainer.model.peft_format import resolve_targets
from trainer.workbench import Workbench

IDLE_S = 2.0
"""Seconds between two looks of an idle worker for a trial that waits."""
MAX_FAILURES_IN_A_ROW = 3
"""Trials that fail one after the other with a fault of ours before a worker gives up: a broken host must not burn
the whole budget (wandb#5088: 470 of 500 runs out of memory)."""

log = logging.getLogger("search.workers.worker")


class Worker:
    """The loop over trials: as many at once as there are slots, all in one pack on one base.

    Asking, judging and telling happen in this one thread, in the order of the trials' steps: the same seed and number
    of slots give the same study.
    """

    def __init__(self, job: Job, link: Link) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        torch.set_num_threads(job.threads)
        self.job = job
        self.link = link
        self.base = job.study.base_config()
        self.storage = reopen_storage(job.places.storage_url, grace_s=round(job.lost_after_s))
        self.storage.say = lambda text: link.send(Notice(text=text))
        self.storage.fits = fits(job.study.space)
        self.study = LongestFirst(
            job.study_name,
            self.storage,
            make_sampler(job.study, job.strategy, job.prior),
            pruning.pruner_for(
                job.pruner, job.study, job.budget, prior=job.prior, proposes=job.strategy == FREEZE_THAW
            ),
            job.study,
            len(job.examined.rows),
        )
        self.study.repeats = job.confirm is not None
        self.runs = StudyRuns(job.places, job.study_name)
        self.watch = Watch(self.study, job.places)
        self._owner: str | None = self.study.user_attrs.get(records.STUDY_ID)
        self.bench = Workbench(job.examined, self.base.data)
        identity = {**this_process(), lifecycle.LOST_AFTER: job.lost_after_s}
        self.source = TrialSource(self.study, self.storage, job, identity, self._say, self.watch.check)
        self._captioning = Captioning(self.study, self.base, self.bench, job.folder, job.captions)
        self._testing = Testing(self.study, job, self.bench, self.runs, link)
        self._room = Room(Slots(1), one_by_one=job.one_by_one)
        self._handing_over = HandingOver(link)
        self._gpus: GpuWatch | None = None
        self._running: dict[Member, TrialRun] = {}
        self._held: TrialRun | None = None
        """Asked for, but of a kind that cannot train beside those that are running."""
        self._failures = 0
        """Trials that failed since one last ended otherwise."""

    @property
    def context(self) -> TrialContext:
        """What the worker's trials are part of."""
        return TrialContext(
            study=self.study,
            job=self.job,
            runs=self.runs,
            link=self.link,
            slots=self._room.slots.most,
            check=self.watch.check,
            captioning=self._captioning,
            owner=self._owner,
            gpus=self._gpus,
            bench=self.bench,
        )

    def run(self) -> None:
        """Run trials until the study is complete or the supervisor asks to stop.

        Raises:
            GaveUp: too many trials failed in a row.
            UserError: model, data or study cannot be used, the database is away or a disk is full.
        """
        # Load the base, and check what would fail every trial before one is taken.
        self.link.send(Loading(what=self.base.model))
        self.bench.progress = self._show_features
        base = self.bench.base(self.base)
        for config in [self.base, *(self.job.study.config({}, fixed.config) for fixed in self.job.study.enqueue)]:
            if config.model == self.base.model:
                resolve_targets(base.model, config.target_modules)
        others = [fingerprint(fetch(name)) for name in self.job.study.models() if name != self.base.model]
        studies.check_fingerprints(
            self.study, data=self.job.examined.fingerprint, model=base.fingerprint, others=others
        )
        # How many trials at once.
        chosen = self._room.slots = slots.resolve(self.job.slots, self.job.study, self.bench)
        self.study.longest_first = chosen.most > 1 or self.job.workers > 1
        self.link.send(SlotsChosen(most=chosen.most, samples=chosen.samples, auto=self.job.slots is None))
        # One pack after the other.
        if base.device.type == "cuda":
            self._gpus = GpuWatch()  # a daemon: it ends with the process
            self._gpus.start()
        with beating(self.study, self.job.lost_after_s, self._alive):
            try:
                while self._train() or self._more_may_come():
                    pass
            except DatabaseAway:  # the trials resume from their checkpoints another time
                self._held = None
                while self._running:
                    self._running.popitem()[1].abandon(records.INTERRUPTED)
                raise
            finally:
                if self._held is not None:  # an end came before its turn; it has no record of its own yet
                    with suppress(UpdateFinishedTrialError):  # taken over
                        lifecycle.park(self.study, self._held.trial)

    def _alive(self) -> list[TrialRun]:
        """The trials that heartbeats are recorded for."""
        return [*self._running.values()] + ([self._held] if self._held else [])

    def _train(self) -> bool:
        """Run a pack until it is empty; False when there is nothing left to run."""
        with Pack(self.bench, owner=self._owner) as pack:
            pack.passes.alive = self.link.alive
            try:
                while self._fill(pack):
                    for member, event in pack.round():
                        self._take(pack, member, event)
                    self._let_go(pack)
            except DatabaseAway:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is: reported, logged, and the trials resume or fail
                self._pack_failed(error)
                return True
        return self._held is not None and self.link.order() == Order.GO_ON

    def _more_may_come(self) -> bool:
        """Wait a while as long as other workers have trials that they could hand over; False at the search's end."""
        if self.link.order() == Order.GO_ON:
            self._testing.test()
        if self.link.order() == Order.GO_ON:
            self.link.send(Idle())
            self.link.wait(IDLE_S)
        self.source.supply = Supply.UNKNOWN
        return self.link.order() == Order.GO_ON

    def _fill(self, pack: Pack) -> bool:
        """Give every free slot a trial; False if none is running then."""
        if self.link.look:
            self.link.look = False
            self.source.supply = Supply.UNKNOWN
        while self._has_room() and self.link.order() == Order.GO_ON:
            run = self._held or self._next()
            self._held = None
            if run is None:
                break
            if not pack.accepts(run.config):
                self._held = run
                break
            with self._blamed_on(run):
                outcome = run.begin()
                if outcome is None:
                    self._running[pack.add(run.config, run.folder)] = run
                else:
                    self._end(run, outcome)
        return bool(self._running)

    def _has_room(self) -> bool:
        return self._room.beside([run.config.batch_size for run in self._running.values()])

    def _next(self) -> TrialRun | None:
        trial = self.source.next()
        if trial is None:
            return None
        self._handing_over.cancel()
        return TrialRun(trial, self.context)

    def _take(self, pack: Pack, member: Member, happening: Event | RunError) -> None:
        """Pass on what happened to a run to its trial, and let it go if that ends it."""
        run = self._running.get(member)
        if run is None:
            return
        with self._blamed_on(run):
            if run.taken_over:
                raise UpdateFinishedTrialError
            if isinstance(happening, UserError | OSError):
                raise happening
            outcome = run.take(happening)
            handed_over = outcome is None and self._handing_over.includes(run, happening, len(self._running))
            if handed_over:
                outcome = run.interrupted("handed over to another worker ")
            if outcome is not None:
                self._end(run, outcome)
            if handed_over:
                self.source.supply = Supply.DRY  # what waits now is for the other worker
        if run.over:
            pack.remove(member)
            del self._running[member]

    def _let_go(self, pack: Pack) -> None:
        """Runs that left the pack without a word: another process finished them while this one slept, after it had
        read their history and before it loaded their checkpoint. Parked, or left to the other; nobody waits for them.
        """
        for member in [member for member in self._running if member not in pack.members]:
            run = self._running.pop(member)
            with self._blamed_on(run):
                self._end(run, run.interrupted())

    def _end(self, run: TrialRun, outcome: Outcome) -> None:
        run.end(outcome)
        self._failures = 0
        self._ended()

    def _ended(self) -> None:
        """A trial has ended, in whatever way."""
        self.source.supply = Supply.UNKNOWN  # a trial of a worker that died may be waiting by now
        self._room.one_ended()

    @contextmanager
    def _blamed_on(self, run: TrialRun) -> Iterator[None]:
        """A fault in this block is this trial's alone: it fails, the others continue.

        Raises:
            GaveUp: too many in a row.
            NoRoom: a disk is full, which is not a trial's fault: none is to fail for it.
            DatabaseAway: likewise.
        """
        number = run.trial.number
        try:
            yield
            return
        except DatabaseAway:
            run.abandon(records.INTERRUPTED)
            raise
        except UpdateFinishedTrialError:
            self._leave(run)
            return
        except UserError as error:
            if out_of_room(error):
                raise
            text = str(error)
            self._say(f"trial {number} failed: {text}")
        except Exception as error:
            if out_of_room(error):
                raise no_room(error, self.job.folder) from error
            log.exception("trial %d failed", number)
            if (gone := self.watch.problem()) is not None:  # which no trial is to blame for
                run.abandon(records.INTERRUPTED)
                raise gone from error
            text = f"{type(error).__name__}: {error}"
            self._say(f"trial {number} failed: {text}; traceback in {self.job.folder / 'search.log'}")
        try:
            run.end(Outcome(state="FAIL", reason=records.ERROR, detail=text))
        except UpdateFinishedTrialError:
            self._leave(run)
            return
        self._ended()
        self._failures += 1
        if self._failures >= MAX_FAILURES_IN_A_ROW:
            raise GaveUp(f"{self._failures} trials in a row failed, the last with: {text}")

    def _leave(self, run: TrialRun) -> None:
        """Another process has taken the trial over."""
        run.abandon(records.LOST)
        self._say(f"trial {run.trial.number} was taken over by another process, and is left to it")

    def _pack_failed(self, error: Exception) -> None:
        """A fault in the shared pass: with one trial it is the trial's; several resume one by one."""
        self._running = {member: run for member, run in self._running.items() if not run.over}
        full = out_of_room(error)
        if full or isinstance(error, GaveUp) or not self._running:  # the worker ends
            self._park_all(disk_is_full=full)
            raise error
        if len(self._running) == 1:
            with self._blamed_on(self._running.popitem()[1]):
                raise error
            return
        number = len(self._running)
        log.error("%d trials in one pass failed; they resume one by one", number, exc_info=error)
        self._say(f"{type(error).__name__}: {error}; {number} trials resume one by one")
        self._room.one_by_one = self._park_all()
        self.source.supply = Supply.UNKNOWN

    def _park_all(self, *, disk_is_full: bool = False) -> int:
        """Have the running trials wait; returns how many do. One that another process has taken over is left to it.

        Each stays among the running until it waits: should the database go away in between, the rest are abandoned.
        """
        parked = 0
        for member, run in list(self._running.items()):
            try:
                run.end(run.interrupted())
                parked += 1
            except UpdateFinishedTrialError:
                self._leave(run)
            except Exception:
                if not disk_is_full:
                    raise
                # The databases may lie on that disk: the next start finds the trial lost.
                log.exception("trial %d could not be parked", run.trial.number)
            del self._running[member]
        return parked

    def _show_features(self, done: int, total: int) -> None:
        self.link.send(Loading(what=f"vision outputs of {total} images ({100 * done // total} %)"))

    def _say(self, text: str) -> None:
        self.link.send(Notice(text=text))


class GaveUp(RuntimeError):
    """Too many trials failed one after the other."""
