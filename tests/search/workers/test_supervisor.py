"""The supervisor's own loop, with processes that only pretend to work."""

from __future__ import annotations

import multiprocessing
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from search.records import LOST
from search.storage.lifecycle import Unfinished
from search.workers.multiprocessing_private import UNGUARDED, UNSEEN
from search.workers.protocol import HandOver, Idle, Message, Order, TrialEnded, TrialStarted
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
        look=lambda blamed: Unfinished(waiting=0, running=0),
        trial_ended=lambda: None,
    )
    assert supervisor.run() == 0
    # Once the kernel takes the process apart its sentinel can be read, some milliseconds before it can be reaped.
    before_the_end = rounds.times[-1] - LINGERS_S / 3
    lingering = [at for at in rounds.times if before_the_end - LINGERS_S / 3 < at < before_the_end]
    assert len(lingering) < 5


def test_workers_out_of_sight_are_not_dead(monkeypatch: Any) -> None:
    """The process they were forked from was killed: all seem to end at once, with the library's 255, and live."""
    stage = Stage(monkeypatch)
    for index in range(6):
        assert stage.supervisor._ended(ended(index, 255, os.getpid())) == 0
    assert stage.started == list(range(6)) and stage.supervisor._deaths == 0
    assert stage.said[0] == "Lost track of worker 0; starting a replacement that resumes its trials."
    assert len(stage.said) == 6 and stage.blamed == []
    assert stage.lost == [3, 4] * 6, "the live table had their trials for ever"


def test_workers_that_would_start_a_search_each_are_told_of_once(monkeypatch: Any) -> None:
    stage = Stage(monkeypatch)
    for index in range(2):
        assert stage.supervisor._ended(ended(index, UNGUARDED, running=())) == 2
    assert stage.started == [] and stage.supervisor._order == Order.END_AFTER_EPOCH
    assert len(stage.said) == 1 and 'if __name__ == "__main__":' in stage.said[0]


class Stage:
    """A supervisor without processes, and what it does."""

    def __init__(self, monkeypatch: Any) -> None:
        self.said: list[str] = []
        self.lost: list[int] = []
        """Trials that the display was told are lost."""
        self.blamed: list[set[int]] = []
        """Trials that each look was told of."""
        self.started: list[int] = []

        class Shown(Rounds):
            def say(_, text: str) -> None:
                self.said.append(text)

            def __call__(_, message: Message) -> None:
                assert isinstance(message, TrialEnded) and message.reason == LOST
                self.lost.append(message.number)

        def look(blamed: Any) -> Any:
            self.blamed.append(set(blamed))
            return Unfinished(waiting=0, running=0)

        display: Any = Shown()
        nothing: Any = None
        self.supervisor = Supervisor(
            nothing,
            nothing,
            timeout_s=None,
            hang_timeout_s=60.0,
            display=display,
            look=look,
            trial_ended=lambda: None,
        )
        monkeypatch.setattr(self.supervisor, "_start", lambda index, one_by_one=0: self.started.append(index))


def ended(index: int, exit_code: int, pid: int = 2**22 + 1, running: tuple[int, ...] = (3, 4)) -> WorkerSlot:
    """The place of a worker that has ended with some trials running."""
    process: Any = SimpleNamespace(pid=pid, exitcode=exit_code, close=lambda: None)
    link: Any = SimpleNamespace(close=lambda: None)
    return WorkerSlot(index, process, link, running=set(running))


@pytest.mark.parametrize(
    ("what", "exit_code", "order", "blamed"),
    [
        ("killed alone", -9, Order.GO_ON, {3, 4}),
        ("out of memory in a library", -6, Order.END_AFTER_EPOCH, {3, 4}),
        ("ended by itself", 0, Order.GO_ON, set()),
        ("killed while all are being ended", -9, Order.END_NOW, set()),
        ("with the process that it was forked from", UNSEEN, Order.GO_ON, set()),
    ],
)
def test_a_death_is_blamed_on_trials_only_if_their_worker_died_alone(
    monkeypatch: Any, what: str, exit_code: int, order: Order, blamed: set[int]
) -> None:
    stage = Stage(monkeypatch)
    stage.supervisor._order = order
    stage.supervisor._ended(ended(0, exit_code))
    assert stage.blamed == [blamed], what
    stage.supervisor._look(0)
    assert stage.blamed[1] == set(), "told once"


def start(number: int) -> TrialStarted:
    """A trial's start."""
    return TrialStarted(number=number, config={}, label=None, resumed_from_epoch=0)


def end(number: int, state: str = "COMPLETE") -> TrialEnded:
    """A trial's end."""
    return TrialEnded(number=number, state=state, reason="", detail="", value=None, findings=(), elapsed_s=0.0)


class Sharing:
    """Workers of a stage that only take orders."""

    def __init__(self, stage: Stage, workers: int) -> None:
        self.supervisor = stage.supervisor
        self.sent: list[list[Any]] = [[] for _ in range(workers)]
        nothing: Any = None
        links: list[Any] = [SimpleNamespace(send=sent.append) for sent in self.sent]
        self.slots = [WorkerSlot(index, nothing, link) for index, link in enumerate(links)]
        self.supervisor._workers = self.slots

    def hear(self, index: int, *messages: Message) -> None:
        """Messages of one worker, and a round of the supervisor."""
        for message in messages:
            self.supervisor._note(self.slots[index], message)
        self.supervisor._share_out()


def test_a_request_that_could_not_be_met_blocks_no_later_one(monkeypatch: Any) -> None:
    """Both trials ended before one could be handed over; the worker then took nine, and none was asked for."""
    workers = Sharing(Stage(monkeypatch), 2)
    workers.hear(0, start(0), start(1))
    workers.hear(1, Idle())
    workers.hear(1)
    assert workers.sent[0] == [HandOver()], "once"
    workers.hear(0, end(0), end(1))
    workers.hear(0, *map(start, range(2, 11)))
    assert workers.sent[0] == [HandOver()] * 2
    workers.hear(0, end(2))  # eight are left, and none of them has come
    workers.hear(1)
    assert workers.sent[0] == [HandOver()] * 3


def test_a_trial_that_fails_is_no_sign_of_a_healthy_host(monkeypatch: Any) -> None:
    stage = Stage(monkeypatch)
    workers = Sharing(stage, 2)
    stage.supervisor._deaths = 4
    workers.hear(0, end(0, "FAIL"))
    assert stage.supervisor._deaths == 4
    workers.hear(0, end(1))
    assert stage.supervisor._deaths == 0
