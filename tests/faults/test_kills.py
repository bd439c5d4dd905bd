"""kill -9 at random moments: of a worker, the supervisor, both, and the process that workers are forked from."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search import records
from tests.faults.harness import Place, check_records, storm, write_study
from tests.support.search_process import Search

Start = Callable[[list[str]], Search]
EPOCH = re.compile(r"\bepoch \d+:")


@pytest.mark.slow
def test_supervisor_and_worker_are_killed_at_once(
    tiny_checkpoint: Path, tmp_path: Path, start: Start, bench: Any
) -> None:
    place = Place(tmp_path / "runs")
    command = place.command(write_study(tmp_path, tiny_checkpoint, trials=1, num_epochs=20))
    search = start(command)
    search.wait_for("epoch 2:")
    os.killpg(search.process.pid, signal.SIGKILL)
    again = start(command)
    assert again.end() == 0, again.output()
    again.wait_for("trial 0 was lost: process")
    assert "after epoch" in again.wait_for("trial 1: learning_rate"), "it started over"
    check_records(place, bench, num_trials=1, num_epochs=20)


@pytest.mark.slow
def test_preemption_within_the_first_epoch_again_and_again(
    tiny_checkpoint: Path, tmp_path: Path, start: Start, bench: Any
) -> None:
    """kill -9 of the whole group, more often than a trial has attempts: it has used none."""
    place = Place(tmp_path / "runs")
    base = {"max_samples": 160, "batch_size": 1, "num_epochs": 2}
    command = place.command(write_study(tmp_path, tiny_checkpoint, trials=2, **base))
    for _ in range(4):
        search = start(command)
        search.wait_for(": learning_rate=")
        os.killpg(search.process.pid, signal.SIGKILL)
        search.process.wait()
    assert all(not reports for reports in place.reports.values()), "an epoch was done: the kills show nothing"
    last = start(command)
    assert last.end() == 0, last.output()
    assert len(place.trials) == 2 + 4
    check_records(place, bench, num_trials=2, num_epochs=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_preempted_every_two_epochs_a_study_has_what_the_undisturbed_one_has(
    tiny_checkpoint: Path, tmp_path: Path, start: Start, bench: Any
) -> None:
    """kill -9 of supervisor, fork server and workers at once; time is scaled down, the same command each time."""
    rng, trials, num_epochs = random.Random(0), 3, 6
    file = write_study(tmp_path, tiny_checkpoint, trials=trials, batch_size=1, num_epochs=num_epochs)
    alone = Place(tmp_path / "alone")
    undisturbed = start(alone.command(file))
    assert undisturbed.end() == 0, undisturbed.output()
    place, kills = Place(tmp_path / "runs"), 0
    while True:
        search = start(place.command(file))
        while search.process.poll() is None and sum(EPOCH.search(line) is not None for line in search.lines) < 2:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))  # somewhere within the third epoch
        if search.process.poll() is not None:
            assert search.process.returncode == 0, search.output()
            break
        os.killpg(search.process.pid, signal.SIGKILL)
        search.kill()
        kills += 1
    assert kills >= trials * num_epochs // 3 - 1, f"killed {kills} times only: that shows little"
    assert [t.attrs.get(records.ATTEMPT, 0) for t in place.trials] == [0] * len(place.trials), "an attempt was used"
    assert outcomes(place) == outcomes(alone)
    check_records(place, bench, num_trials=trials, num_epochs=num_epochs)


def outcomes(place: Place) -> list[tuple[Any, ...]]:
    """What the trials of a study came to, in order of their first beginning, whoever ended them."""
    trials, reports, found = place.trials, place.reports, {}
    resumed = {t.attrs[records.RESUMES] for t in trials if records.RESUMES in t.attrs}
    for trial in trials:
        if trial.number not in resumed:
            first = trial
            while records.RESUMES in first.attrs:
                first = trials[first.attrs[records.RESUMES]]
            losses = tuple(reports[trial.number].values())
            found[first.number] = (
                trial.state,
                trial.params,
                trial.best_epoch,
                losses,
                trial.attrs[records.TRAIN_LOSSES],
            )
    return [found[number] for number in sorted(found)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_in_one_study(tiny_checkpoint: Path, tmp_path: Path, start: Start, bench: Any) -> None:
    rng = random.Random(0)
    place = Place(tmp_path / "runs", workers=2)
    command = place.command(write_study(tmp_path, tiny_checkpoint, trials=24, num_epochs=120))
    kills = rng.choices(["worker", "supervisor", "both", "importer"], weights=[5, 3, 2, 1], k=50)
    done = storm(lambda: start(command), kills, rng, longest_s=6)
    print(dict(done))
    check_records(place, bench, num_trials=24, num_epochs=120)
