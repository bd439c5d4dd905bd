"""A worker: one process that loads the base model once and runs trials until none is left: ask, train, report, tell.

Importing this module loads neither torch nor Optuna nor MLflow: the process sets its environment first.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from search.errors import DatabaseAway
from search.processes import this_process
from search.workers.job import Job, Link
from search.workers.protocol import Idle, Loading, Notice, Order, SlotsChosen, WorkerFailed
from search.workers.slots import Slots
from trainer.common.disk import no_room, out_of_room
from trainer.common.errors import UserError
from trainer.common.imports import import_libraries, without_collection

if TYPE_CHECKING:
    import optuna

    from search.workers.trial import Outcome, TrialRun
    from trainer.loop import Happening, Pack
    from trainer.member import Member
    from trainer.workbench import Workbench

BEATS = 20
"""Heartbeats in the time after which a trial is lost (`Job.lost_after_s`)."""
IDLE_S = 2.0
"""Seconds between two looks of an idle worker for a trial that waits."""
WORTH_MOVING_S = 2.0
"""A trial with less than this left to train is not handed over: going on elsewhere takes half a second."""
MAX_FAILURES_IN_A_ROW = 3
"""Trials that fail one after the other with a fault of ours before a worker gives up: a broken host must not burn
the whole budget (wandb#5088: 470 of 500 runs out of memory)."""

log = logging.getLogger("search.workers.worker")


def work(connection: Connection, gpu: str | None, threads: int) -> None:
    """Main function of a worker process.

    It imports what it will need before its job is known, while the supervisor still opens the databases.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ.update(environment(threads))
    # Ctrl-C reaches the whole process group; what it means is the supervisor's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = Link(connection)
    signal.signal(signal.SIGTERM, lambda *_: link.raise_to(Order.END_NOW))
    import_early()
    try:
        job: Job = connection.recv()
    except EOFError:  # the search did not come to its start
        return
    set_up_logging(job.folder)
    try:
        Worker(job, link).run()
    except UserError as error:
        link.send(WorkerFailed(text=str(error), user=True))
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        log.exception("worker ended by a fault")
        if out_of_room(error):
            link.send(WorkerFailed(text=str(no_room(error, job.folder)), user=True))
            raise SystemExit(2) from None
        link.send(WorkerFailed(text=f"{type(error).__name__}: {error}", user=False))
        raise SystemExit(1) from None


def environment(threads: int) -> dict[str, str]:
    """The variables that libraries read when they are loaded."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # OpenMP threads that spin while they wait slow processes that share cores tenfold (measured); with none of it
        # they go to sleep between any two operations, and two threads take twice as long as one. 5,000 turns are some
        # 10 microseconds: a pass of 33 samples takes 124 ms with one thread, with two 269, and 87 with these.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "5000" if threads > 1 else "0"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def import_early() -> None:
    """Five seconds of imports, most of them Transformers'."""
    with without_collection(), suppress(ImportError):
        import_libraries()
        from search.storage import database
        from search.tracking import runs as runbook
        from search.workers import trial

        del database, runbook, trial


def set_up_logging(folder: Path) -> None:
    """All log lines of a study, with tracebacks, go to one file; each line is written at once."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "search.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk is told once, not with each line that it does not take
    logging.captureWarnings(True)
    for name in ("httpx", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Worker:
    """The loop over trials: as many at once as there are slots, all in one pack on one base.

    Asking, judging and telling happen in this one thread, in the order of the trials' steps: the same seed and number
    of slots give the same study.
    """

    def __init__(self, job: Job, link: Link) -> None:
        import optuna
        import torch

        from search import pruning
        from search.sampling.make import make_sampler
        from search.storage import lifecycle
        from search.storage.database import reopen_storage
        from search.storage.queue import LongestFirst
        from search.tracking.runs import StudyRuns
        from trainer.workbench import Workbench

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        torch.set_num_threads(job.threads)
        self.job = job
        self.link = link
        self.base = job.study.base_config()
        self.storage = reopen_storage(job.storage_url, grace_s=round(job.lost_after_s))
        self.storage.say = lambda text: link.send(Notice(text=text))
        self.study = LongestFirst(
            job.study_name,
            self.storage,
            make_sampler(job.study, job.strategy, job.n_trials),
            pruning.pruner_for(job.pruner, self.base),
            job.study,
            len(job.examined.rows),
        )
        self.book = StudyRuns(job.tracking_uri, job.runs_dir / "artifacts", job.study_name, job.folder)
        self.bench: Workbench = Workbench(job.examined, self.base.data)
        self.identity = {**this_process(), lifecycle.LOST_AFTER: job.lost_after_s}
        self.slots = Slots(1)
        self._failures = 0
        self._running: dict[Member, TrialRun] = {}
        self._held: TrialRun | None = None
        """Asked for, but of a kind that cannot train beside those that are running."""
        self._has_asked = False
        self._dry = False
        """The study wanted no further trial when it was last asked: not to be asked at every step."""
        self._to_give = 0
        """Running trials still to be handed over to an idle worker."""
        self._alone = job.one_by_one
        """Trials still to be run one by one, after a fault that no single one could be blamed for."""

    def run(self) -> None:
        """Run trials until the study has all it wants or the supervisor wants an end."""
        from search.storage import lifecycle, studies
        from search.workers import slots
        from trainer.model.peft_format import resolve_targets

        self.link.send(Loading(what=self.base.model))
        self.bench.progress = self._show_features
        base = self.bench.base(self.base)
        for config in [self.base, *(self.job.study.config({}, fixed.config) for fixed in self.job.study.enqueue)]:
            if config.model == self.base.model:
                resolve_targets(base.model, config.target_modules)  # before a trial is taken that could not be run
        studies.check_fingerprints(self.study, data=self.job.examined.fingerprint, model=base.fingerprint)
        self.slots = slots.resolve(self.job.slots, self.job.study, self.bench)
        self.study.longest_first = self.slots.most > 1 or self.job.workers > 1
        self.link.send(SlotsChosen(most=self.slots.most, samples=self.slots.samples, auto=self.job.slots is None))
        with self._beating():
            try:
                while self._train() or self._more_may_come():
                    pass
            except DatabaseAway:  # nobody can be told now; the trials go on from their checkpoints another time
                self._held = None
                for run in self._running.values():
                    run.leave()
                raise
            finally:
                if self._held is not None:  # an end came before its turn; it has no record of its own yet
                    lifecycle.park(self.study, self._held.trial)

    def _train(self) -> bool:
        """Run a pack until it is empty; False when there is nothing left to run."""
        from trainer.loop import Pack

        with Pack(self.bench) as pack:
            pack.alive = self.link.alive
            try:
                while self._fill(pack):
                    for member, event in pack.round():
                        self._take(pack, member, event)
            except DatabaseAway:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is: told, logged, and the trials go on or fail
                self._pack_failed(error)
                return True
        return self._held is not None and self.link.order() == Order.GO_ON

    def _more_may_come(self) -> bool:
        """Wait a while as long as other workers have trials that they could hand over; False at the search's end."""
        if self.link.order() == Order.GO_ON:
            self.link.send(Idle())
            self.link.wait(IDLE_S)
        self._dry = False
        return self.link.order() == Order.GO_ON

    def _fill(self, pack: Pack) -> bool:
        """Give every free slot a trial; False if none is running then."""
        if self.link.look:
            self.link.look = self._dry = False
        while self._room() and self.link.order() == Order.GO_ON:
            run = self._held or (None if self._dry else self._next())
            self._held = None
            if run is None:
                self._dry = True
                break
            if not pack.accepts(run.config):
                self._held = run
                break
            with self._blamed_on(run):
                outcome = run.begin()
                if outcome is None:
                    self._running[pack.add(run.config, run.folder)] = run
                else:
                    self._finish(run, outcome)
        return bool(self._running)

    def _room(self) -> bool:
        slots = Slots(1) if self._alone else self.slots
        return slots.room([run.config.batch_size for run in self._running.values()])

    def _next(self) -> TrialRun | None:
        from search.workers.trial import TrialRun

        trial = self._ask()
        if trial is None:
            return None
        self._to_give = 0  # there is work for whoever is idle: nobody waits for ours any more
        return TrialRun(trial, self)

    def _take(self, pack: Pack, member: Member, happening: Happening) -> None:
        """Pass on what happened to a run to its trial, and let it go if that ends it."""
        from optuna.exceptions import UpdateFinishedTrialError

        run = self._running.get(member)
        if run is None:
            return
        outcome = None
        with self._blamed_on(run):
            if run.taken_over:
                raise UpdateFinishedTrialError
            if isinstance(happening, UserError | OSError):
                raise happening
            outcome = run.take(happening)
            given = outcome is None and self._gives(run, happening)
            if given:
                outcome = run.hand_over()
            if outcome is not None:
                self._finish(run, outcome)
            if given:
                self._dry = True  # what waits now is for the other worker
        if outcome is not None or run.failed:
            pack.remove(member)
            del self._running[member]

    def _gives(self, run: TrialRun, happening: Happening) -> bool:
        """Whether the trial is to go on in a worker that has nothing to do, from the checkpoint just written."""
        from trainer.events import CheckpointSaved

        if self.link.share:
            self.link.share = False
            self._to_give = len(self._running) // 2
        if not self._to_give or len(self._running) < 2 or not isinstance(happening, CheckpointSaved):
            return False
        if run.left_s() < WORTH_MOVING_S:
            return False
        self._to_give -= 1
        return True

    def _finish(self, run: TrialRun, outcome: Outcome) -> None:
        run.finish(outcome)
        self._failures = 0
        self._dry = False  # a trial of a worker that died may be waiting by now
        self._alone = max(0, self._alone - 1)

    @contextmanager
    def _blamed_on(self, run: TrialRun) -> Iterator[None]:
        """A fault within is this trial's alone: it fails, the others go on.

        Raises:
            GaveUp: too many in a row.
            NoRoom: a disk is full, which is no trial's fault: none is to fail for it.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            yield
            return
        except DatabaseAway:
            run.leave()
            raise
        except UpdateFinishedTrialError:
            run.let_go()
            self.link.send(Notice(text=f"trial {run.trial.number} was taken over by another process; let go here"))
            return
        except UserError as error:
            if out_of_room(error):
                raise
            text = str(error)
            self.link.send(Notice(text=f"trial {run.trial.number} failed: {text}"))
        except Exception as error:
            if out_of_room(error):
                raise no_room(error, self.job.folder) from error
            log.exception("trial %d failed", run.trial.number)
            text = f"{type(error).__name__}: {error}"
            where = self.job.folder / "search.log"
            self.link.send(Notice(text=f"trial {run.trial.number} failed: {text}; traceback in {where}"))
        run.fail(text)
        self._dry = False
        self._alone = max(0, self._alone - 1)
        self._failures += 1
        if self._failures >= MAX_FAILURES_IN_A_ROW:
            raise GaveUp(f"{self._failures} trials in a row failed, the last with: {text}")

    def _pack_failed(self, error: Exception) -> None:
        """A fault in the shared pass: with one trial it is the trial's; several go on one by one, from checkpoints."""
        running, self._running = [run for run in self._running.values() if not run.failed], {}
        if isinstance(error, GaveUp):
            for run in running:
                run.finish(run.park())
            raise error
        if out_of_room(error):
            for run in running:
                try:
                    run.finish(run.park())
                except Exception:  # the databases may lie on that disk: the next start finds the trial lost
                    log.exception("trial %d could not be parked", run.trial.number)
            raise error
        if len(running) == 1:
            with self._blamed_on(running[0]):
                raise error
            return
        if not running:
            raise error
        log.error("%d trials in one pass failed; they go on one by one", len(running), exc_info=error)
        self.link.send(Notice(text=f"{type(error).__name__}: {error}; {len(running)} trials go on one by one"))
        for run in running:
            run.finish(run.park())
        self._dry = False
        self._alone = len(running)

    def _ask(self) -> optuna.Trial | None:
        """The next trial, or None if the total is reached. One worker at a time counts and asks."""
        from datetime import datetime

        from search.sampling.params import suggest
        from search.storage import lifecycle
        from search.storage.database import exclusive
        from search.storage.studies import check_definition

        began, tries = datetime.now(), 0

        def ask() -> optuna.Trial | None:
            nonlocal tries
            tries += 1
            with exclusive(self.storage):
                if tries > 1:  # the database went away meanwhile, and may have given a trial before it did
                    lifecycle.put_back(self.study, self.identity, began)
                if not lifecycle.needs_another(self.study, self.job.n_trials):
                    return None
                if not self._has_asked:  # from here on the study has a trial, and keeps its definition
                    check_definition(self.study, self.job.study)
                    self._has_asked = True
                trial = self.study.ask()
                trial.set_user_attr("worker", self.identity)
                lifecycle.heartbeat(self.study, trial)  # a trial that was parked has an old one
                suggest(trial, self.job.study)
            return trial

        return self.storage.retrying(ask)

    def _show_features(self, done: int, total: int) -> None:
        self.link.send(Loading(what=f"vision outputs of {total} images ({100 * done // total} %)"))

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """Heartbeats of the trials from a thread: Optuna records them inside `optimize` only (optuna#3293)."""
        from search.storage import lifecycle

        done = threading.Event()

        def beat() -> None:
            while not done.wait(self.job.lost_after_s / BEATS):
                runs = [*self._running.values()] + ([self._held] if self._held else [])
                for run in runs:
                    try:
                        run.taken_over = not lifecycle.heartbeat(self.study, run.trial)
                    except Exception:  # whatever the database's driver raises; the next beat may get through
                        log.exception("heartbeat of trial %d not recorded", run.trial.number)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=5)


class GaveUp(RuntimeError):
    """Too many trials failed one after the other."""
