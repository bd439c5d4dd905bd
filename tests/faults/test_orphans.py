"""A search worker that has DataLoader processes is killed: nothing of it is left after seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.search_process import Search, command, workers_of

SETTINGS = ("max_samples=24", "num_epochs=400", "warmup_steps=0", "num_workers=2", "cache_features=false")


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_loaders_of_a_killed_worker_end(tmp_path: Path, start: Callable[[list[str]], Search]) -> None:
    fixed = ("--trials", "1", "--slots", "1", "--workers", "1")
    search = start(command(tmp_path / "runs", *fixed, settings=SETTINGS))
    search.wait_for("epoch 1:")
    worker = workers_of(search.process.pid)[0]
    loaders = worker.children(recursive=True)
    assert len(loaders) >= 4, "two to train and two to validate"
    worker.kill()
    end = time.monotonic() + 60
    while time.monotonic() < end and any(map(alive, loaders)):
        time.sleep(0.2)
    left = [loader for loader in loaders if alive(loader)]
    search.kill()
    assert left == []
