"""A worker: one process that loads the base model once and runs trials until none is left: ask, train, report, tell.

Importing this module loads neither torch nor Optuna nor MLflow: the process sets its environment first.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from search.messages import Gave, Loading, Message, Order, Said
from search.study import Study
from trainer.dataset import Examined
from trainer.errors import UserError

if TYPE_CHECKING:
    import optuna

    from search.tracking import Tracking
    from search.trial import Outcome
    from trainer.bench import Workbench

HEARTBEAT_S = 60
MAX_FAILURES_IN_A_ROW = 3
"""Trials that fail one after the other with a fault of ours before a worker gives up: a broken host must not burn
the whole budget (wandb#5088: 470 of 500 runs out of memory)."""

log = logging.getLogger("search.worker")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker of a search is given. Picklable: it crosses to a new process."""

    study: Study
    study_name: str
    """Optuna's name, which tells generations apart."""
    storage_url: str
    tracking_uri: str
    runs_dir: Path
    n_trials: int
    strategy: str
    pruner: str
    examined: Examined
    threads: int

    @property
    def folder(self) -> Path:
        """Where the study's files lie."""
        return self.runs_dir / self.study_name


class Link:
    """The worker's end of the pipe: sends messages, and keeps the highest order received."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._order = Order.GO_ON

    def send(self, message: Message) -> None:
        """Tell the supervisor. If it is gone, the worker ends at the next step."""
        try:
            self._connection.send(message)
        except OSError:
            self._order = Order.END_NOW

    def order(self) -> Order:
        """What is wanted now. Cheap enough to ask at every step."""
        try:
            while self._connection.poll():
                self.raise_to(Order(self._connection.recv()))
        except (EOFError, OSError):
            self._order = Order.END_NOW  # the supervisor died
        return self._order

    def raise_to(self, order: Order) -> None:
        """Take an order, unless a higher one was taken before."""
        self._order = max(self._order, order)


def work(job: Job, connection: Connection, gpu: str | None) -> None:
    """Main function of a worker process."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(job.threads)
    # OpenMP threads that spin while they wait slow processes that share cores tenfold (measured).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    link = Link(connection)
    # Ctrl-C reaches the whole process group; what it means is the supervisor's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: link.raise_to(Order.END_NOW))
    set_up_logging(job.folder)
    try:
        _Worker(job, link).run()
    except UserError as error:
        link.send(Gave(text=str(error), user=True))
        raise SystemExit(2) from None
    except Exception as error:
        log.exception("worker ended by a fault")
        link.send(Gave(text=f"{type(error).__name__}: {error}", user=False))
        raise SystemExit(1) from None


def set_up_logging(folder: Path) -> None:
    """All log lines of a study, with tracebacks, go to one file; each line is written at once."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "search.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for name in ("httpx", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


class _Worker:
    """The loop over trials."""

    def __init__(self, job: Job, link: Link) -> None:
        import optuna
        import torch

        from search import lifecycle, pruning, sampling, tracking
        from search.database import open_storage
        from trainer.bench import Workbench

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        torch.set_num_threads(job.threads)
        self.job = job
        self.link = link
        self.base = job.study.base_config()
        self.storage = open_storage(job.storage_url, heartbeat_s=HEARTBEAT_S)
        self.study: optuna.Study = optuna.load_study(
            study_name=job.study_name,
            storage=self.storage,
            sampler=sampling.make_sampler(job.study, job.strategy, job.n_trials),
            pruner=pruning.pruner_for(job.pruner, self.base),
        )
        self.tracking: Tracking = tracking.open_tracking(job.tracking_uri, job.runs_dir / "artifacts")
        self.bench: Workbench = Workbench(job.examined, self.base.data)
        self.identity = lifecycle.this_worker()

    def run(self) -> None:
        """Run trials until the study has all it wants or the supervisor wants an end."""
        from search import storage

        self.link.send(Loading(what=self.base.model))
        base = self.bench.base(self.base)
        storage.check_fingerprints(self.study, data=self.job.examined.fingerprint, model=base.fingerprint)
        failures = 0
        while self.link.order() == Order.GO_ON:
            trial = self._ask()
            if trial is None:
                return
            outcome = self._run_trial(trial)
            failures = failures + 1 if outcome.state == "FAIL" else 0
            if failures >= MAX_FAILURES_IN_A_ROW:
                raise RuntimeError(f"{failures} trials in a row failed, the last with: {outcome.detail}")

    def _ask(self) -> optuna.Trial | None:
        """The next trial, or None if the total is reached. One worker at a time counts and asks."""
        from optuna.trial import TrialState

        from search import lifecycle, sampling
        from search.database import exclusive

        with exclusive(self.storage):
            waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if not waiting and lifecycle.counted(self.study) >= self.job.n_trials:
                return None
            trial = self.study.ask()
            trial.set_user_attr("worker", self.identity)
            sampling.suggest(trial, self.job.study)
        return trial

    def _run_trial(self, trial: optuna.Trial) -> Outcome:
        from search import trial as trials

        with self._beating(trial):
            try:
                return trials.run(trial, self)
            except UserError as error:
                trials.fail(trial, self, str(error))
                self.link.send(Said(text=f"trial {trial.number} failed: {error}"))
                return trials.Outcome(state="FAIL", reason="error", detail=str(error))
            except Exception as error:
                log.exception("trial %d failed", trial.number)
                text = f"{type(error).__name__}: {error}"
                trials.fail(trial, self, text)
                where = self.job.folder / "search.log"
                self.link.send(Said(text=f"trial {trial.number} failed: {text}; traceback in {where}"))
                return trials.Outcome(state="FAIL", reason="error", detail=text)

    @contextmanager
    def _beating(self, trial: optuna.Trial) -> Iterator[None]:
        """Heartbeats from a thread while a trial runs: Optuna records them inside `optimize` only (optuna#3293)."""
        from search import lifecycle

        done = threading.Event()

        def beat() -> None:
            while True:
                try:
                    lifecycle.heartbeat(self.study, trial)
                except Exception:  # whatever the database's driver raises; the next beat may get through
                    log.exception("heartbeat of trial %d not recorded", trial.number)
                if done.wait(HEARTBEAT_S):
                    return

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=5)
