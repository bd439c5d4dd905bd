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
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.errors import DatabaseAway, StudyError, Unavailable
from search.options import SearchOptions
from search.planning.budget import Budget
from search.result import INTERRUPTED, Result
from search.space import size
from search.study import Study
from search.study_file import load
from search.verdict.leaders import Rules, verdict_of, winner
from search.verdict.tested import TestLosses, is_due
from search.workers.executor import Executor
from search.workers.protocol import Display, Job, Message, Notice
from trainer.common import progress
from trainer.common.errors import shown
from trainer.common.imports import without_collection

if TYPE_CHECKING:
    import optuna

    from search.planning.prior import Prior
    from search.preflight import Checked
    from search.records import TrialRecord
    from search.report.keeper import LogKeeper
    from search.storage.identity import Watch
    from search.storage.lifecycle import Unfinished
    from search.storage.retry import RetryingStorage
    from search.tracking.delivery import DeliveryThread
    from search.tracking.outbox import Status
    from search.tracking.runs import StudyRuns
    from search.workers.pool import WorkerPool
    from search.workers.supervisor import Supervisor
    from trainer.data.dataset import Examined

ENDS: dict[int, Status] = {0: "FINISHED", **dict.fromkeys(INTERRUPTED, "KILLED")}
"""MLflow's status of the study's own run by exit code; FAILED for all others."""


BEST = "best"
"""Alias of the version of the registered model that the winner made: `models:/STUDY@best`."""


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
        self.definition = definition.with_settings(self.options.settings, self.options.seed)
        # Every trial trains an epoch at least, so with epochs alone as many trials come of it as will.
        self.budget = Budget(
            self.options.trials or self.options.epochs or self.definition.n_trials, self.options.epochs
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
        self.strategy, self.pruner = self.options.strategy or "", self.options.pruner or ""
        """What the study is run with, known once it is open."""
        self.prior: Prior | None = None
        """What earlier runs say of good effective rates: those of `--warm-start`, or that the study was begun with."""
        self.log_file: Path | None = None
        """Takes all log lines and tracebacks; None until the study is open."""
        self._end_logging: Callable[[], None] | None = None
        self._rules: Rules | None = None
        """How the leaders are repeated at the end; None if they are not."""
        self._storage: RetryingStorage | None = None
        self._runs: StudyRuns | None = None
        self._watch: Watch | None = None
        self._supervisor: Supervisor | None = None
        self._stop: list[bool] = []
        self._notes: list[str] = []
        """To be said once there is where."""
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._result: Result | None = None
        self._error: BaseException | None = None

    # ------------------------------------------------------------------ for programs

    def start(self) -> None:
        """Run the search in a thread of its own. `watch` gives its messages, `result` waits for its end."""
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

        if self.options.pruner is not None:
            pruning.check_name(self.options.pruner)
        if self.options.warm_start:
            from search.storage import warm_start

            self.prior = warm_start.read(self.options.warm_start, self.options.places)
        workers = self._executor.workers_here()
        at_once = None if workers is None else workers * (self.options.slots or 1)
        return preflight.check(self.definition, self._executor.sees(), at_once, progress)

    def _run(self, pool: WorkerPool, checked: Checked, make_display: Any) -> Result:
        options, places = self.options, self.options.places
        with without_collection():
            from search import preflight
            from search.processes import is_gone
            from search.report.keeper import LogKeeper
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
        study = self._open_study()
        name = study.study_name
        self._open_folder(study)

        # MLflow: what an earlier search left is delivered, and the study's own run set to RUNNING.
        runs = StudyRuns(places, name)
        delivery = Delivery(runs.outbox, name, runs.connect)
        caught_up = False
        with suppress(Unavailable):
            caught_up = delivery.once().records > 0
        preflight.log_data(checked)
        self._runs = runs
        stated = {"strategy": self.strategy, "pruner": self.pruner, **self.definition.stop_rule()}
        stated |= {"objective": self.definition.objective}
        away = runs.start_study(checked.tags(), study_run.params(self.definition.definition(), stated))

        job = self._job(name, checked.examined, pool)

        def read() -> tuple[TrialRecord, ...]:
            return lifecycle.read_trials(study)

        display: Display = Logged(make_display(read), Pace(read, self.budget, self._rules))
        look = self._look_for_lost(study, runs, pool, display)
        keeper = LogKeeper(study, runs, job.folder, places.options())
        courier = DeliveryThread(delivery, shown_url(places.tracking_uri), display.say)
        assert self._storage is not None
        self._storage.say = display.say
        runs.close_dangling(is_gone)
        left = look(())
        done = lifecycle.counted(study)

        # The workers, to their end.
        with display:
            display.say(summary.headline(job, study, done))
            for warning in checked.warnings():
                display.say(f"data: warning: {warning}")
            for note in self._notes:
                display.say(note)
            courier.start(away)
            code = 0
            if self._has_work(study, left):
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
        return self._close(code, study, runs, courier, keeper)

    def _has_work(self, study: optuna.Study, left: Unfinished) -> bool:
        """Whether workers have anything to do: trials, or the test loss, if a search was interrupted before it.

        Args:
            study: The study.
            left: What waits and runs, repeats that are wanted included.
        """
        from search.storage import lifecycle

        if left.waiting or left.running or self.budget.new_left(study.get_trials(deepcopy=False)):
            return True
        if self._rules is None or not self.options.test_images:
            return False
        verdict = verdict_of(lifecycle.read_trials(study), study.user_attrs)
        return verdict is not None and is_due(study.user_attrs, verdict)

    def _open_study(self) -> optuna.Study:
        """The study in Optuna's database: continued, or created."""
        import optuna

        from search import pruning, records
        from search.sampling.make import FREEZE_THAW, RUNGS, default_strategy, make_sampler
        from search.sampling.samplers import GridInOrder
        from search.storage import studies
        from search.storage.database import open_storage

        options = self.options
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        _make_folder(options.places.runs_dir)
        self._storage = open_storage(options.places.storage_url, grace_s=round(options.lost_after_s))
        begun_with = None if options.fresh else studies.held_strategy(self._storage, self.definition.name)
        self.strategy = options.strategy or begun_with or default_strategy(self.definition)
        self.pruner = options.pruner or pruning.default_pruner(self.strategy)
        study = studies.open_study(
            self._storage,
            self.definition,
            fresh=options.fresh,
            sampler=make_sampler(self.definition, self.strategy),
            pruner=pruning.pruner_for(self.pruner, self.definition, self.budget),
        )
        studies.check_strategy(study, self.strategy)
        if isinstance(study.sampler, GridInOrder):
            self._cap("grid", study.sampler.total(study))
        elif self.definition.space and (most := size(self.definition.space)) is not None:
            self._cap("space", most + studies.beside_the_space(study))
        given, self.prior = self.prior, studies.hold_prior(study, self.prior)
        if given is not None and given != self.prior:
            self._notes.append(
                f"--warm-start is left out: the study {study.study_name!r} has begun without these runs; a new one, "
                "with --fresh, begins with them"
            )
        elif given is not None and not {self.strategy, self.pruner} & {FREEZE_THAW, RUNGS}:
            self._notes.append(f"--warm-start is of no use here: it is for --strategy {FREEZE_THAW} or {RUNGS}")
        study.set_user_attr(records.SETTINGS, list(options.settings))  # for the commands that the tuning log proposes
        if self.budget.epochs != study.user_attrs.get(records.EPOCHS):
            study.set_user_attr(records.EPOCHS, self.budget.epochs)
        if self.definition.objective == "cider":
            self._notes.append(
                "trials are ranked by CIDEr-D of their captions of all validation images; the leaders are not repeated"
            )
        elif options.confirm:
            held = study.user_attrs.get(records.CONFIRM)
            asked = options.top is not None or options.seeds is not None
            self._rules = Rules(**held) if held and not asked else Rules(top=options.top, seeds=options.seeds)
            study.set_user_attr(records.CONFIRM, asdict(self._rules))  # for the log, and for searches that go on
        return study

    def _tell_mlflow(self, error: BaseException) -> None:
        """End the study's own run, if it has begun, for a search that does not come to its end."""
        killed = isinstance(error, KeyboardInterrupt | SystemExit)
        if self._runs is not None:
            with suppress(Exception):  # what ended the search is what is to be told
                self._runs.end_study("KILLED" if killed else "FAILED", {})

    def _cap(self, what: str, most: int) -> None:
        """Ask for no more trials than a grid or a finite space has points."""
        if self.budget.trials > most:
            self._notes.append(
                f"the {what} has {most} trials, and {self.budget.trials} were asked for: it ends once it is done"
            )
            self.budget = replace(self.budget, trials=most)

    def _close_storage(self) -> None:
        """Leave no connection to a later session of this process."""
        from search.storage.database import close_storage

        if self._storage is not None:
            close_storage(self._storage)
            self._storage = None

    def _open_folder(self, study: optuna.Study) -> None:
        from search.storage.identity import Watch, claim
        from search.workers.start import set_up_logging

        name = study.study_name
        folder = self.options.places.study(name)
        _make_folder(folder)
        claim(folder, study)
        self._watch = Watch(study, self.options.places)
        self._end_logging = set_up_logging(folder)
        self.log_file = self.options.places.log(name)

    def _job(self, name: str, examined: Examined, pool: WorkerPool) -> Job:
        options = self.options
        return Job(
            study=self.definition,
            study_name=name,
            places=options.places,
            budget=self.budget,
            strategy=self.strategy,
            pruner=self.pruner,
            prior=self.prior,
            examined=examined,
            threads=pool.threads,
            workers=pool.size,
            slots=options.slots,
            lost_after_s=options.lost_after_s,
            confirm=self._rules,
            captions=options.captions,
            test_images=options.test_images,
        )

    def _look_for_lost(
        self, study: optuna.Study, runs: StudyRuns, pool: WorkerPool, display: Display
    ) -> Callable[[Collection[int]], Unfinished]:
        """A function that takes up what dead workers left, and says how many trials wait and run."""
        from search import records
        from search.processes import is_gone
        from search.storage import lifecycle
        from search.workers import repeats

        rules = self._rules

        def look(blamed: Collection[int]) -> Unfinished:
            gone = lifecycle.requeue_lost(study, is_alive=pool.alive, blamed=blamed)
            for lost in gone:
                goes_on = (
                    "it is not tried again" if lost.successor is None else f"trial {lost.successor} takes up its work"
                )
                display.say(f"trial {lost.number} was lost: {lost.detail}; {goes_on}")
                if lost.run_id is not None:
                    runs.end(lost.run_id, "KILLED", {"state": "FAIL", "reason": records.LOST})
            if gone:  # a worker may have died before it wrote down which run it had begun
                runs.close_dangling(is_gone)
            left = lifecycle.unfinished(study)
            if rules is not None and not left.waiting and not left.running:
                left = replace(left, waiting=len(repeats.wanted(study, rules, self.budget)))
            return left

        return look

    def _close(
        self, code: int, study: optuna.Study, runs: StudyRuns, courier: DeliveryThread, keeper: LogKeeper
    ) -> Result:
        """Deliver, write the log, end the study's run in MLflow."""
        from search import leaderboard, records
        from search.processes import is_gone
        from search.storage import lifecycle
        from search.terminal import summary

        folder = self.options.places.study(study.study_name)
        gone = self._watch.problem() if self._watch is not None else None
        if code == DatabaseAway.exit_code or gone is not None:  # neither trials nor log can be read now
            runs.end_study("KILLED" if gone is None else "FAILED", {})
            courier.close()
            code = code if gone is None else gone.exit_code
            return Result(code=code, study_name=study.study_name, trials=(), logs=(), folder=folder)
        courier.close()  # first, so that the log has what MLflow has
        logs = keeper.close() if keeper.is_alive() else []
        trials = lifecycle.read_trials(study)
        if code == 0 and leaderboard.all_failed(trials):
            code = 1  # 0 says that the study has what was asked for
        judged = {trial.number: trial.attrs.get(records.FINDINGS) for trial in keeper.trials}
        trials = tuple(
            replace(t, attrs={**t.attrs, records.FINDINGS: judged[t.number]}) if judged.get(t.number) else t
            for t in trials
        )  # the terminal says of a trial what the log says
        verdict = verdict_of(trials, study.user_attrs)
        self._keep_winner(winner(trials, verdict), folder, study.study_name, runs)
        runs.end_study(ENDS.get(code, "FAILED"), summary.study_tags(trials, verdict))
        undelivered = courier.close(0)
        runs.close_dangling(is_gone)
        return Result(
            code=code,
            study_name=study.study_name,
            trials=trials,
            logs=tuple(logs),
            folder=folder,
            verdict=verdict,
            tested=TestLosses.of(study.user_attrs, verdict),
            undelivered=undelivered,
        )

    def _keep_winner(self, trial: TrialRecord | None, folder: Path, name: str, runs: StudyRuns) -> None:
        """The winner's adapter as its run's model in MLflow, registered under the study's name."""
        from search import leaderboard
        from search.records import VAL_CIDER, score_of
        from search.tracking.outbox import Model

        if trial is None or trial.run_id is None or trial.value is None or trial.best_epoch is None:
            return
        adapter, score = leaderboard.adapter(folder, trial), score_of(trial.attrs)
        if adapter.is_dir():
            model = Model(
                path=str(adapter.absolute()),
                name=name,
                alias=BEST,
                step=trial.best_epoch,
                metrics={"val_loss": trial.value, **({} if score is None else {VAL_CIDER: score})},
                params={key: str(value) for key, value in trial.params.items()},
            )
            runs.keep_model(trial.run_id, model)


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
