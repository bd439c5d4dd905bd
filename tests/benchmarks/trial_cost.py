"""What a trial costs beside its training, early in a study and late: ask, suggest, record, report, judge, tell, note.

The worker's own code runs it, on SQLite; only the pack is replaced by events that were made up. The study never
trains, so its thousandth trial is reached in minutes.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna

from search import study_file as studies
from search.places import Places
from search.planning.budget import Budget
from search.storage import studies as store
from search.storage.database import open_storage
from search.tracking.client import open_tracking
from search.workers.protocol import Job, Message, Order
from search.workers.trial import TrialRun
from search.workers.worker import Worker
from tests.support.made_up_events import started
from trainer.data import dataset
from trainer.events import EpochEnded, EpochTiming, Event, StepEnded, StepTiming

EPOCHS, STEPS = 6, 20
"""Of a made-up trial: about what a trial of rsicap_mini has."""
AROUND = 5
"""Trial n stands for the trials from n - 5 to n + 5."""


class Deaf:
    """A supervisor's end of the pipe that nobody listens to."""

    def send(self, message: Message) -> None:
        """Nothing."""

    def order(self) -> Order:
        """Always to go on."""
        return Order.GO_ON


def made_up(number: int) -> Iterator[Event]:
    """The events of a healthy trial; its losses depend on its number alone."""
    rng = random.Random(number)
    level = rng.uniform(0.4, 0.6)
    yield replace(
        started(EPOCHS * STEPS, modules=4),
        num_train_samples=128,
        num_val_samples=32,
        steps_per_epoch=STEPS,
        skipped_rows=(),
    )
    for step in range(1, EPOCHS * STEPS + 1):
        epoch = 1 + (step - 1) // STEPS
        loss = level + 0.3 / step + rng.uniform(0, 0.02)
        timing = StepTiming(step_s=0.05, data_wait_s=0.0)
        yield StepEnded(
            step=step,
            epoch=epoch,
            loss=loss,
            grad_norm=rng.uniform(0.2, 0.8),
            learning_rate=1e-4,
            num_samples=6,
            num_tokens=200,
            timing=timing,
        )
        if step % STEPS == 0:
            yield EpochEnded(
                epoch=epoch,
                step=step,
                train_loss=level + 0.1 / epoch,
                val_loss=level + 0.1 / epoch,
                learning_rate=1e-4,
                grad_norm_mean=0.5,
                grad_norm_max=0.8,
                nonfinite_steps=0,
                timing=EpochTiming(
                    epoch_s=1.3,
                    train_s=1.0,
                    data_wait_s=0.0,
                    eval_s=0.2,
                    checkpoint_s=0.05,
                    samples_per_s=120.0,
                    peak_memory_gib=0.5,
                ),
            )


def measure_trials(trials: int) -> None:
    """Run so many made-up trials; prints what trial 10 and the last ones cost."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        worker = _worker(Path(name), trials)
        walls: list[float] = []
        parts: list[tuple[float, float, float]] = []
        for number in range(trials):
            began = time.perf_counter()
            parts.append(_one(worker))
            walls.append(time.perf_counter() - began)
            if (number + 1) % 100 == 0:
                print(
                    f"  {number + 1} trials, the last 100 at {1e3 * statistics.median(walls[-100:]):.0f} ms",
                    flush=True,
                )
    print(
        f"search and tracking of a trial ({EPOCHS} epochs, {EPOCHS * STEPS} steps), on SQLite: ms (ask, events, end)"
    )
    early, late = _median(walls, parts, 10), _median(walls, parts, trials - AROUND - 1)
    for label, (wall, split) in (("trial 10", early), (f"trial {trials}", late)):
        shown = ", ".join(f"{1e3 * part:.0f}" for part in split)
        print(f"  {label:<12} {1e3 * wall:8.1f}   ({shown})")
    print(f"  ratio {late[0] / early[0]:.2f}")


def _median(
    walls: list[float], parts: list[tuple[float, float, float]], middle: int
) -> tuple[float, tuple[float, ...]]:
    here = slice(max(0, middle - AROUND), middle + AROUND + 1)
    split = tuple(statistics.median(part) for part in zip(*parts[here], strict=True))
    return statistics.median(walls[here]), split


def _one(worker: Worker) -> tuple[float, float, float]:
    """One trial as the worker runs it: seconds to ask, to take its events, to end it."""
    began = time.perf_counter()
    trial = worker.source.ask()
    assert trial is not None
    asked = time.perf_counter()
    run = TrialRun(trial, worker.context)
    outcome = run.begin()
    for event in made_up(trial.number):
        outcome = run.take(event)
        if outcome is not None:
            break
    taken = time.perf_counter()
    assert outcome is not None, "the trial had all its epochs"
    run.end(outcome)
    return asked - began, taken - asked, time.perf_counter() - taken


def _worker(folder: Path, trials: int) -> Worker:
    """A worker on fresh databases, opened as `search.run` opens them."""
    definition = studies.load("rsicap_mini")
    storage_url, tracking_uri = f"sqlite:///{folder / 'optuna.db'}", f"sqlite:///{folder / 'mlflow.db'}"
    examined = dataset.examine("mini")
    study = store.open_study(open_storage(storage_url), definition)
    tracking = open_tracking(tracking_uri, folder / "artifacts")
    tracking.experiment(study.study_name)
    tracking.parent_run(study.study_name, {})
    job = Job(
        study=definition,
        study_name=study.study_name,
        places=Places.of(folder, storage_url, tracking_uri),
        budget=Budget(trials),
        strategy="joint",
        pruner="rising",
        examined=examined,
        threads=1,
    )
    return Worker(job, Deaf())  # type: ignore[arg-type]  # it sends and asks for orders, which is all that is used
