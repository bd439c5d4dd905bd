"""`Session`: one search, from its first database to its last line.

The command line (`search.run`) and programs use the same class:

    session = Session("rsicap_mini", SearchOptions(trials=6))
    session.start()
    for message in session.watch():      # values of search.workers.protocol, as they come
        print(message)
    result = session.result()            # Result: trials, best, adapter, logs, exit code

`docs/python.md` has the whole of it as an example, which a test runs.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.errors import StudyError, Unavailable
from search.options import SearchOptions
from search.planning.budget import Budget
from search.study import Study
from search.study_file import load
from search.workers.executor import Executor
from search.workers.multiprocessing_private import refuse_in_a_worker
from search.workers.protocol import Display, Job, Message, Notice
from trainer.common import progress
from trainer.common.errors import shown
from trainer.common.imports import without_collection

if TYPE_CHECKING:
    from search.planning.prior import Prior
    from search.preflight import Checked
    from search.records import TrialRecord
    from search.result import Result
    from search.session.opening import Opened
    from search.storage.identity import Watch
    from search.storage.retry import RetryingStorage
    from search.tracking.runs import StudyRuns
    from search.workers.pool import WorkerPool
    from search.workers.supervisor import Supervisor
    from trainer.data.dataset import Examined


class Session:
    """One search. `run` it in this thread, or `start` it, `watch` it and take its `result`."""

    def __init__(self, study: Study | str, options: SearchOptions | None = None) -> None:
        """Check the definition and the options; nothing is opened, written or started.

        Args:
            study: A definition, the name of a study in `studies/`, or the path of a study file.
            options: How it is run.

        Raises:
            UserError: everything that is wrong with the study; an option that does not fit it.
        """
        self.options = options or SearchOptions()
        definition = load(study) if isinstance(study, str) else study
        self._file = study if isinstance(study, str) and study.replace("-", "_") != definition.name else None
        self.definition = definition.with_settings(self.options.settings, self.options.seed)
        # Every trial trains an epoch at least, so with epochs alone as many trials come of it as will.
        self.budget = Budget(
            self.options.trials or self.options.epochs or self.definition.n_trials,
            self.options.epochs,
            each=self.definition.most_epochs(),
        )
        asked = self.options.top is not None or self.options.seeds is not None
        self.definition.check_way(self.options.strategy, self.options.pruner, repeats=asked)
        self._executor = Executor(
            kind=self.options.executor,
            workers=self.options.workers,
            gpus_per_worker=self.options.gpus_per_worker,
            ray_address=self.options.ray_address,
        )
        self._executor.check(self.definition)
        self.prior: Prior | None = None
        """What the runs of `--warm-start` say of good effective rates, once they are read."""
        self.log_file: Path | None = None
        """Takes all log lines and tracebacks; None until the study is open."""
        self._end_logging: Callable[[], None] | None = None
        self._storage: RetryingStorage | None = None
        self._runs: StudyRuns | None = None
        self._supervisor: Supervisor | None = None
        self._stop: list[bool] = []
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._result: Result | None = None
        self._error: BaseException | None = None

    # ------------------------------------------------------------------ for programs

    def start(self) -> None:
        """Run the search in a thread of its own. `watch` gives its messages, `result` waits for its end."""
        refuse_in_a_worker()
        self._thread = threading.Thread(target=self._run_aside, name="session", daemon=False)
        self._thread.start()

    def watch(self) -> Iterator[Message]:
        """The workers' messages as they come, until the search has ended.

        Ctrl-C within (or "interrupt" of a notebook) is `stop`: trials finish their epoch and wait to be continued.
        """
        while True:
            try:
                message = self._messages.get()
            except KeyboardInterrupt:
                self.stop()
                continue
            if message is None:
                self._messages.put(None)  # for whoever watches after the end
                return
            yield message

    def stop(self, *, now: bool = False) -> None:
        """End the search after the running epochs, or `now` at the next step; the same study can be continued."""
        self._stop.append(now)
        if self._supervisor is not None:
            self._supervisor.stop(now=now)

    def result(self) -> Result:
        """Wait for the end of a search that was started.

        Raises:
            UserError: whatever kept it from its end, as `run` does.
        """
        assert self._thread is not None, "start the session first"
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _run_aside(self) -> None:
        try:
            self._result = self.run(lambda read: _Mailbox(self._messages))
        except BaseException as error:
            logging.getLogger("search").exception("the session ended by an error")
            self._error = error  # `result` raises it where it can be seen
        finally:
            if self._end_logging is not None:  # the program's own logging again
                self._end_logging()
            self._messages.put(None)

    # ------------------------------------------------------------------ the search

    def run(self, display: Callable[[Callable[[], tuple[TrialRecord, ...]]], Display]) -> Result:
        """Check model and data, run the workers to the end, and sum up.

        Args:
            display: Makes what shows the workers' messages, from a function that reads the trials.

        Raises:
            UserError: model or data cannot be used, a database cannot be opened, the definition has changed.
        """
        refuse_in_a_worker()
        places = self.options.places
        pool = self._executor.pool({"--storage": places.storage_url, "--tracking-uri": places.tracking_uri})
        with pool.importing():
            with progress.bar("looking at images") as show:
                checked = self.check(show)
            with pool:
                try:
                    return self._run(pool, checked, display)
                except BaseException as error:
                    self._tell_mlflow(error)
                    raise
                finally:
                    self._close_storage()

    def check(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Checked:
        """Check what needs more than the definition: the pruner's name, the runs that a study begins with, the model,
        the data, room for its batches.

        Args:
            progress: called with (images looked at, all of them).

        Raises:
            UserError: everything that is missing, and how to get it, in one message.
        """
        from search import preflight, pruning  # Optuna takes 0.3 s, which the workers' imports need not wait for
        from search.storage import warm_start

        if self.options.pruner is not None:
            pruning.check_name(self.options.pruner)
        sources = warm_start.read(self.options.warm_start, self.options.places)
        workers = self._executor.workers_here()
        at_once = None if workers is None else workers * (self.options.slots or 1)
        checked = preflight.check(self.definition, self._executor.sees(), at_once, progress)
        self.prior = warm_start.prior_for(self.definition, checked.split.rows, sources)
        return checked

    def _run(self, pool: WorkerPool, checked: Checked, make_display: Any) -> Result:
        options, places = self.options, self.options.places
        with without_collection():
            from search import preflight
            from search.records import STUDY_ID
            from search.report.keeper import LogKeeper
            from search.session import closing
            from search.session.left import Left, has_work, nobody_writes
            from search.storage import lifecycle
            from search.terminal import summary
            from search.terminal.live import Logged
            from search.terminal.pace import Pace
            from search.tracking import study_run
            from search.tracking.delivery import Delivery, DeliveryThread
            from search.tracking.runs import StudyRuns
            from search.urls import shown as shown_url
            from search.workers.supervisor import Supervisor

        # Optuna's database, the study in it, and its folder.
        opened = self._open()
        study, name = opened.study, opened.study.study_name
        watch = self._open_folder(opened)

        # MLflow: what an earlier search left is delivered, and the study's own run set to RUNNING.
        runs = StudyRuns(places, name, study.user_attrs[STUDY_ID])
        delivery = Delivery(runs.outbox, name, runs.connect)
        caught_up = False
        with suppress(Unavailable):
            caught_up = delivery.once().records > 0
        preflight.log_data(checked)
        self._runs = runs
        stated = {"strategy": opened.strategy, "pruner": opened.pruner, **self.definition.stop_rule()}
        stated |= {"objective": self.definition.objective}
        away = runs.start_study(checked.tags(), study_run.params(self.definition.definition(), stated))

        job = self._job(opened, checked.examined, pool)

        def read() -> tuple[TrialRecord, ...]:
            return lifecycle.read_trials(study)

        display: Display = Logged(make_display(read), Pace(read, opened.budget, opened.rules))
        look = Left(opened, runs, pool, display)
        keeper = LogKeeper(study, runs, job.folder, places.options())
        courier = DeliveryThread(delivery, shown_url(places.tracking_uri), display.say)
        assert self._storage is not None
        self._storage.say = display.say
        runs.close_dangling(nobody_writes(read))
        left = look(())
        done = lifecycle.counted(study)

        # The workers, to their end.
        with display:
            display.say(summary.headline(job, study, done))
            for warning in checked.warnings():
                display.say(f"data: warning: {warning}")
            for note in opened.notes:
                display.say(note)
            courier.start(away)
            code = 0
            if has_work(opened, left, options.test_images):
                keeper.start()
                self._supervisor = Supervisor(
                    job,
                    pool,
                    timeout_s=options.timeout_s,
                    display=display,
                    look=look,
                    trial_ended=keeper.due,
                    hang_timeout_s=options.hang_timeout_s,
                )
                for now in self._stop:
                    self._supervisor.stop(now=now)
                code = self._supervisor.run()
            elif caught_up:
                keeper.start()  # the log was written without what came now
        return closing.close(code, study, job.folder, watch, runs, courier, keeper)

    def _open(self) -> Opened:
        """Open Optuna's database, and the study in it."""
        import optuna

        from search.session.opening import open_study
        from search.storage.database import open_storage

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        _make_folder(self.options.places.runs_dir)
        self._storage = open_storage(self.options.places.storage_url, grace_s=round(self.options.lost_after_s))
        return open_study(self._storage, self.definition, self.options, self.budget, self.prior, self._file)

    def _tell_mlflow(self, error: BaseException) -> None:
        """End the study's own run, if it has begun, for a search that does not come to its end."""
        killed = isinstance(error, KeyboardInterrupt | SystemExit)
        if self._runs is not None:
            with suppress(Exception):  # what ended the search is what is to be told
                self._runs.end_study("KILLED" if killed else "FAILED", {})

    def _close_storage(self) -> None:
        """Leave no connection to a later session of this process."""
        from search.storage.database import close_storage

        if self._storage is not None:
            close_storage(self._storage)
            self._storage = None

    def _open_folder(self, opened: Opened) -> Watch:
        from search.storage.identity import Watch, claim
        from search.workers.start import set_up_logging

        name = opened.study.study_name
        folder = self.options.places.study(name)
        _make_folder(folder)
        claim(folder, opened.study)
        self._end_logging = set_up_logging(folder)
        self.log_file = self.options.places.log(name)
        return Watch(opened.study, self.options.places)

    def _job(self, opened: Opened, examined: Examined, pool: WorkerPool) -> Job:
        options = self.options
        return Job(
            study=self.definition,
            study_name=opened.study.study_name,
            places=options.places,
            budget=opened.budget,
            strategy=opened.strategy,
            pruner=opened.pruner,
            prior=opened.prior,
            examined=examined,
            threads=pool.threads,
            workers=pool.size,
            slots=options.slots,
            lost_after_s=options.lost_after_s,
            confirm=opened.rules,
            captions=options.captions,
            test_images=options.test_images,
        )


class _Mailbox:
    """A display that puts what would be shown into a queue."""

    def __init__(self, messages: queue.SimpleQueue[Message | None]) -> None:
        self._messages = messages

    def __enter__(self) -> _Mailbox:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        self._messages.put(Notice(text=text))

    def __call__(self, message: Message) -> None:
        self._messages.put(message)

    def progress(self, text: str) -> None:
        self._messages.put(Notice(text=text))

    def refresh(self) -> None:
        pass


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(
            f"the folder {shown(str(path))} cannot be made: {error.strerror}; name another with --runs-dir"
        ) from None
