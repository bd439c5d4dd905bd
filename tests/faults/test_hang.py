"""A worker that hangs is replaced; one that is busy, or was stopped together with its supervisor, is not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search import records
from search.workers.protocol import Idle, Link
from tests.faults.harness import Place, check_records, workers_of, write_study
from tests.support.search_process import Search
from trainer.config import TrainConfig
from trainer.loop import Pack
from trainer.model.base import forward
from trainer.workbench import Workbench

Start = Callable[[list[str]], Search]


@pytest.mark.slow
def test_a_stopped_worker_is_replaced(tiny_checkpoint: Path, tmp_path: Path, start: Start, bench: Any) -> None:
    place = Place(tmp_path / "runs")
    file = write_study(tmp_path, tiny_checkpoint, trials=1, num_epochs=30)
    search = start(place.command(file, "--hang-timeout", "10s"))
    search.wait_for("epoch 2:")
    (worker,) = workers_of(search)
    worker.suspend()
    began = time.monotonic()
    search.wait_for("Worker 0 has been silent for 1", timeout_s=40)
    assert 8 < time.monotonic() - began < 20
    assert search.end() == 0, search.output()
    lost, resumed = place.trials
    assert (lost.state, lost.reason) == ("FAIL", records.LOST)
    assert resumed.attrs[records.RESUMES] == 0
    assert "after epoch" in search.wait_for("trial 1: learning_rate"), "it started over"
    check_records(place, bench, num_trials=1, num_epochs=30)


class Wire:
    """The worker's end of a pipe, and what went into it."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


def test_every_pass_is_a_sign_of_life(bench: Workbench, small: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """In training and evaluation, micro-batches one by one: a step of minutes is not taken for a hang."""
    passes, signs = 0, 0

    def counted(model: Any, batch: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(model, batch)

    def alive() -> None:
        nonlocal signs
        signs += 1

    with Pack(bench, forward=counted) as pack:
        pack.passes.alive = alive
        pack.add(small(num_epochs=1, micro_batch_size=1, eval_batch_size=1), tmp_path)
        while pack.members:
            list(pack.round())
    assert passes > 12 and signs == passes


def test_signs_of_life_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr("search.workers.protocol.time.monotonic", lambda: clock)
    wire = Wire()
    link = Link(wire)  # type: ignore[arg-type]
    for _ in range(1000):
        clock += 0.01
        link.alive()
    assert 8 <= len(wire.sent) <= 11
    link.send(Idle())
    link.alive()
    assert isinstance(wire.sent[-1], Idle), "another message is a sign of life too"


@pytest.mark.slow
def test_a_search_that_was_stopped_as_a_whole_goes_on(tiny_checkpoint: Path, tmp_path: Path, start: Start) -> None:
    """Ctrl-Z and fg: the time away does not count as silence."""
    place = Place(tmp_path / "runs")
    file = write_study(tmp_path, tiny_checkpoint, trials=1, num_epochs=30)
    search = start(place.command(file, "--hang-timeout", "10s"))
    search.wait_for("epoch 2:")
    os.killpg(search.process.pid, signal.SIGSTOP)
    time.sleep(15)
    os.killpg(search.process.pid, signal.SIGCONT)
    assert search.end() == 0, search.output()
    assert "has been silent" not in search.output()
    assert [t.state for t in place.trials] == ["COMPLETE"]
