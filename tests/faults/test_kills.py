"""kill -9 at random moments: of a worker, the supervisor, both, and the process that workers are forked from."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Place, check_records, storm, write_study
from tests.support.search_process import Search

Start = Callable[[list[str]], Search]


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
@pytest.mark.timeout(1200)
def test_fifty_kills_in_one_study(tiny_checkpoint: Path, tmp_path: Path, start: Start, bench: Any) -> None:
    rng = random.Random(0)
    place = Place(tmp_path / "runs", workers=2)
    command = place.command(write_study(tmp_path, tiny_checkpoint, trials=24, num_epochs=60))
    kills = rng.choices(["worker", "supervisor", "both", "importer"], weights=[5, 3, 2, 1], k=50)
    done = storm(lambda: start(command), kills, rng, longest_s=6)
    print(dict(done))
    check_records(place, bench, num_trials=24, num_epochs=60)
