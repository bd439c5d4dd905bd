"""A small real study to break things in, and what must hold for its records however it was broken."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from search import records
from search.records import TrialRecord
from search.storage import lifecycle
from search.storage.database import close_storage, open_storage
from search.storage.studies import find_study
from search.tracking.client import open_tracking
from tests.support import search_process
from tests.support.search_process import Search
from trainer import checkpoint
from trainer.config import TrainConfig
from trainer.events import EpochEnded
from trainer.loop import train

NAME = "faults"
FILE = """
from search.space import Float, Int
from search.study import Study

STUDY = Study(
    name="faults",
    description="trials of seconds, to be broken",
    base={base},
    space={{"learning_rate": Float(1e-4, 1e-2, log=True), "lora_r": Int(2, 8)}},
    n_trials={trials},
)
"""
BASE = {
    "data": "mini",
    "max_samples": 24,
    "num_epochs": 4,
    "batch_size": 2,
    "warmup_steps": 0,
    "lora_dropout": 0.1,
    "device": "cpu",
}


def write_study(folder: Path, model: Path, trials: int, **base: Any) -> Path:
    """A study file on this model, in this folder."""
    file = folder / f"{NAME}.py"
    file.write_text(FILE.format(base={**BASE, "model": str(model), **base}, trials=trials), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Place:
    """Where a study's records are."""

    runs: Path
    storage: str | None = None
    tracking: str | None = None
    workers: int = 1

    def command(self, file: Path, *arguments: str) -> list[str]:
        """`search.run` with one trial at a time in each worker, none stopped early."""
        urls = ("--storage", self.storage) if self.storage else ()
        uris = ("--tracking-uri", self.tracking) if self.tracking else ()
        fixed = ("--slots", "1", "--pruner", "none", "--workers", str(self.workers))
        return search_process.command(self.runs, *fixed, *urls, *uris, *arguments, study=str(file), settings=())

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        return self._read(lifecycle.read_trials)

    @property
    def reports(self) -> dict[int, dict[int, float]]:
        """Validation losses by trial and epoch, to the last bit. PostgreSQL returns them in any order."""
        return self._read(
            lambda s: {t.number: dict(sorted(t.intermediate_values.items())) for t in s.get_trials(deepcopy=False)}
        )

    def _read(self, what: Callable[[Any], Any]) -> Any:
        storage = open_storage(self.storage or f"sqlite:///{self.runs / 'optuna.db'}")
        try:
            return what(find_study(storage, NAME))
        finally:
            close_storage(storage)

    def tracked(self) -> list[tuple[str, dict[str, str], list[float | None]]]:
        """(status, tags, validation losses by epoch) of the trials' MLflow runs."""
        tracking = open_tracking(self.tracking or f"sqlite:///{self.runs / 'mlflow.db'}", self.runs / "artifacts")
        experiment = tracking.find_experiment(NAME)
        assert experiment is not None
        found = tracking.runs(experiment).values()
        return [(r.status, r.tags, [e.val_loss for e in r.epochs]) for r in found if r.tags.get("kind") != "study"]


def workers_of(search: Search) -> list[psutil.Process]:
    """The worker processes of a search."""
    return search_process.workers_of(search.process.pid)


REST_S = 1800.0
"""What the rest of a study may take after the last kill: 12 minutes, were four processes on two cores."""


def storm(start: Callable[[], Search], kills: Sequence[str], rng: random.Random, *, longest_s: float) -> Counter[str]:
    """Kill -9 a `worker`, the `supervisor`, `both`, or the `importer` that workers are forked from, at random moments.

    A search that this ends is started again.

    Returns:
        How often each was killed.
    """
    done: Counter[str] = Counter()
    search = start()
    for what in kills:
        time.sleep(rng.uniform(0.0, longest_s))
        workers = workers_of(search)
        while search.process.poll() is not None or (what != "supervisor" and not workers):
            if search.process.poll() is not None:
                assert search.process.poll() != 0, f"the study was done after {done.total()} kills: too short"
                search.kill()
                search = start()
            time.sleep(0.05)
            workers = workers_of(search)
        if what in ("supervisor", "both"):
            search.process.kill()
        if what == "importer":
            with suppress(LookupError, psutil.NoSuchProcess):  # it is just being started again, or no longer used
                search_process.importer_of(search.process.pid).kill()
        if what in ("worker", "both"):
            for process in workers if what == "both" else [rng.choice(workers)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        done[what] += 1
    if search.process.poll() is None and search.process.wait(REST_S) == 0:
        return done
    search.kill()
    last = start()
    assert last.end(REST_S) == 0, last.output()
    return done


def check_records(place: Place, bench: Any, *, num_trials: int, num_epochs: int) -> None:
    """Check, whatever happened: final states, one run and lineage each, all epochs, the bits of an undisturbed run."""
    trials, reports = place.trials, place.reports
    assert {t.state for t in trials} <= {"COMPLETE", "FAIL"}, Counter(t.state for t in trials)
    assert [t.number for t in trials] == list(range(len(trials)))
    resumed = [t.attrs[records.RESUMES] for t in trials if records.RESUMES in t.attrs]
    assert len(set(resumed)) == len(resumed), "two trials resume the same work"
    for trial in trials:
        if trial.state == "FAIL":
            assert trial.reason == records.LOST
            assert trial.number in resumed or trial.attrs.get(records.ATTEMPT, 0) >= 2, (
                f"trial {trial.number} was lost"
            )
    assert len(trials) - len(resumed) == num_trials

    runs: dict[int, tuple[str, list[float | None]]] = {}
    for status, tags, losses in place.tracked():
        number = int(tags["trial"])
        assert number not in runs, f"trial {number} has two MLflow runs"
        runs[number] = (status, losses)
    undisturbed = _Undisturbed(bench, place)
    for trial in trials:
        expected = {"COMPLETE": "FINISHED", "FAIL": "KILLED"}[trial.state]
        if trial.number in runs:  # a trial that was lost at its very start may have none
            status, losses = runs[trial.number]
            assert status == expected, f"the run of trial {trial.number} is {status}"
            reported = list(reports[trial.number].values())
            assert losses == reported[: len(losses)], f"trial {trial.number}: MLflow has {losses}, Optuna {reported}"
        curve = undisturbed(trial) if reports[trial.number] else []
        assert list(reports[trial.number].values()) == [e.val_loss for e in curve][: len(reports[trial.number])]
        if trial.state == "COMPLETE":
            assert len(runs[trial.number][1]) == num_epochs == len(reports[trial.number])
            assert trial.attrs[records.TRAIN_LOSSES] == [e.train_loss for e in curve]
            _check_checkpoints(place.runs / NAME / trial.attrs["folder"], TrainConfig.parse(trial.config), num_epochs)
    for file in place.runs.glob("*.db"):
        with sqlite3.connect(file) as connection:
            assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
        connection.close()


class _Undisturbed:
    """Curves of trials' configurations, each trained alone in this process."""

    def __init__(self, bench: Any, place: Place) -> None:
        self._bench, self._folder = bench, place.runs / "again"
        self._threads = max(1, len(os.sched_getaffinity(0)) // place.workers)
        self._known: dict[str, list[EpochEnded]] = {}

    def __call__(self, trial: TrialRecord) -> list[EpochEnded]:
        config = TrainConfig.parse(trial.config)
        key = config.identity()
        if key not in self._known:
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads)  # sums are split among threads: the bits depend on how many
            events = train(config, self._bench, self._folder / str(trial.number))
            self._known[key] = [event for event in events if isinstance(event, EpochEnded)]
            torch.set_num_threads(before)
        return self._known[key]


def _check_checkpoints(folder: Path, config: TrainConfig, num_epochs: int) -> None:
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert 1 <= len(left) <= 2 and all(name.startswith("epoch-") for name in left), left
    found = checkpoint.load(folder, config)
    assert found.problems == () and found.state.epoch == num_epochs
