"""The supervisor's own loop, with processes that only pretend to work."""

from __future__ import annotations

import multiprocessing
import os
import time
from types import SimpleNamespace
from typing import Any

from search.storage.lifecycle import Unfinished
from search.workers.protocol import Message
from search.workers.supervisor import Supervisor, WorkerSlot

LINGERS_S = 1.5


def closes_early(connection: Any) -> None:
    """A worker that has sent all its messages, and takes its time to end."""
    connection.recv()
    connection.close()
    time.sleep(LINGERS_S)


class EarlyPool:
    """One such worker."""

    size = 1

    def take(self, _index: int) -> tuple[Any, Any]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=closes_early, args=(theirs,))
        process.start()
        theirs.close()
        return process, ours


class Rounds:
    """A display that notes when the supervisor makes a round."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def refresh(self) -> None:
        self.times.append(time.monotonic())

    def say(self, text: str) -> None:
        raise AssertionError(text)

    def __call__(self, message: Message) -> None:
        raise AssertionError(message)


def test_the_supervisor_sleeps_while_a_worker_ends(monkeypatch: Any) -> None:
    """A pipe that is closed can be read at once, again and again: 8,000 rounds a second beside workers that end."""
    rounds: Any = Rounds()
    pool: Any = EarlyPool()
    job: Any = {"one_by_one": 0}
    monkeypatch.setattr("search.workers.supervisor.replace", lambda job, **_: job)
    supervisor = Supervisor(
        job,
        pool,
        timeout_s=None,
        hang_timeout_s=60.0,
        display=rounds,
        look=lambda: Unfinished(waiting=0, running=0),
        trial_ended=lambda: None,
    )
    assert supervisor.run() == 0
    # Once the kernel takes the process apart its sentinel can be read, some milliseconds before it can be reaped.
    before_the_end = rounds.times[-1] - LINGERS_S / 3
    lingering = [at for at in rounds.times if before_the_end - LINGERS_S / 3 < at < before_the_end]
    assert len(lingering) < 5


def test_workers_out_of_sight_are_not_dead(monkeypatch: Any) -> None:
    """The process they were forked from was killed: all seem to end at once, with the library's 255, and live."""
    said: list[str] = []

    class Shown(Rounds):
        def say(self, text: str) -> None:
            said.append(text)

    display: Any = Shown()
    supervisor = Supervisor(
        Any,  # type: ignore[arg-type]
        Any,  # type: ignore[arg-type]
        timeout_s=None,
        hang_timeout_s=60.0,
        display=display,
        look=lambda: None,  # type: ignore[arg-type,return-value]
        trial_ended=lambda: None,
    )
    started: list[int] = []
    monkeypatch.setattr(supervisor, "_start", lambda index, one_by_one=0: started.append(index))
    for index in range(6):
        process: Any = SimpleNamespace(pid=os.getpid(), exitcode=255, close=lambda: None)
        link: Any = SimpleNamespace(close=lambda: None)
        assert supervisor._ended(WorkerSlot(index, process, link)) == 0
    assert started == list(range(6)) and supervisor._deaths == 0
    assert said[0] == "Lost track of worker 0; starting a replacement that resumes its trials." and len(said) == 6
