"""What goes over the pipe between a supervisor and each of its workers; all of it pickles.

    supervisor  --- Job, then Order or HandOver --->  worker, by its `Link`
    supervisor  <-- Message ------------------------  worker

A trial's progress is sent as the trainer's own events, so that another metric of an epoch needs no change here.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from search.options import LOST_AFTER_S
from search.places import Places
from search.planning.budget import Budget
from search.planning.prior import Prior
from search.study import Study
from search.verdict.leaders import Rules
from trainer.data.dataset import Examined
from trainer.events import EpochEnded, RunStarted, StepEnded

ALIVE_S = 1.0
"""Least seconds between two `Alive` messages."""


# Down: the job, then orders.


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker of a search needs to know before it starts."""

    study: Study
    study_name: str
    """The name in Optuna's database, which differs between generations of a study."""
    places: Places
    budget: Budget
    strategy: str
    pruner: str
    prior: Prior | None = None
    """Of good effective rates; None for the one that comes with the program."""
    examined: Examined
    threads: int
    """BLAS threads of a worker."""
    workers: int = 1
    """Workers of this search."""
    slots: int | None = None
    """Trials that a worker trains at once; None for as many as pay and fit."""
    lost_after_s: float = LOST_AFTER_S
    """Seconds without a heartbeat after which other hosts take the trials over."""
    confirm: Rules | None = None
    """How the leaders are repeated once the search has nothing left; None if they are not."""
    captions: int = 0
    """Validation images that each trial which completes captions."""
    test_images: int = 0
    """Images outside of the search on which the verdict's candidates are judged once, at the end."""
    one_by_one: int = 0
    """Trials to be run alone first: those of a worker that died with several, one of which may have killed it."""

    @property
    def folder(self) -> Path:
        """The folder of the study's files."""
        return self.places.study(self.study_name)


class Order(IntEnum):
    """How a worker is to proceed; a higher order overrides a lower one."""

    GO_ON = 0
    END_AFTER_EPOCH = 1
    """Finish the current epoch, save, set the trial back to waiting, and end."""
    END_NOW = 2
    """The same at the next step; the epoch in progress is lost."""


@dataclass(frozen=True)
class HandOver:
    """Asks a worker with several trials to hand half of them over, each after its epoch, to a worker without any."""


# Up: messages.


@dataclass(frozen=True)
class Idle:
    """The worker has nothing to train, and the study no trial for it; another worker may hand some of its own over."""


@dataclass(frozen=True)
class Alive:
    """Work continues, in a stretch without other messages: a long step or evaluation."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The worker is loading its base model."""

    what: str


@dataclass(frozen=True, kw_only=True)
class SlotsChosen:
    """How many trials the worker trains at once."""

    most: int
    samples: float
    """Samples in a pass from which no further trial is taken in."""
    auto: bool


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A trial began, or resumes."""

    number: int
    config: dict[str, Any]
    label: str | None
    resumed_from_epoch: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """An event of a trial's training: its start, a step now and then, each epoch that was reported."""

    number: int
    event: RunStarted | StepEnded | EpochEnded
    """`RunStarted` comes without the names of modules and rows, thousands on a large model."""
    from_checkpoint: bool = False
    """Whether the epoch was trained before, and is read from the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrialEnded:
    """A trial has left its worker: it reached a final state, waits to be resumed, or is lost (FAIL, `records.LOST`):
    another process has taken it over, or the worker died. Of a FAIL a `Notice` or the supervisor says what happened.
    """

    number: int
    state: str
    reason: str
    detail: str
    value: float | None
    findings: tuple[str, ...]
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something the user should know."""

    text: str


@dataclass(frozen=True, kw_only=True)
class WorkerFailed:
    """The worker cannot continue."""

    text: str
    user: bool
    """Whether it is the user's mistake, and not a fault of ours."""


Message = Alive | Idle | Loading | SlotsChosen | TrialStarted | Progress | TrialEnded | Notice | WorkerFailed


class Display(Protocol):
    """Where the supervisor shows messages (`search.terminal.live`). A context: on the screen while it lasts."""

    def __enter__(self) -> Display: ...
    def __exit__(self, *_: object) -> None: ...
    def say(self, text: str) -> None:
        """Show a line."""

    def __call__(self, message: Message) -> None:
        """Show a worker's message."""

    def progress(self, text: str) -> None:
        """Show how far the study is."""

    def refresh(self) -> None:
        """Redraw what moves with the clock."""


class Link:
    """The worker's end of the pipe: sends messages, and keeps the highest order received."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._order = Order.GO_ON
        self._last_sent = 0.0
        self.share = False
        """Whether a worker without trials waits for half of the running ones (`HandOver`)."""
        self.look = False
        """Whether another worker has set a trial back to waiting."""

    def send(self, message: Message) -> None:
        """Send a message to the supervisor. If that is gone, the worker ends at the next step."""
        self._last_sent = time.monotonic()
        try:
            self._connection.send(message)
        except OSError:
            self._order = Order.END_NOW

    def alive(self) -> None:
        """Give a sign of life, unless another message has just been one."""
        if time.monotonic() - self._last_sent >= ALIVE_S:
            self.send(Alive())

    def order(self) -> Order:
        """The highest order so far. Cheap enough to ask for at every step."""
        try:
            while self._connection.poll():
                received = self._connection.recv()
                if isinstance(received, HandOver):
                    self.share = True
                else:
                    self.look = True
                    self.raise_to(Order(received))
        except (EOFError, OSError):
            self._order = Order.END_NOW  # the supervisor died
        return self._order

    def wait(self, timeout_s: float) -> None:
        """Wait until the supervisor sends something, or for `timeout_s` seconds."""
        with suppress(EOFError, OSError):
            self._connection.poll(timeout_s)

    def raise_to(self, order: Order) -> None:
        """Take an order, unless a higher one was taken before."""
        self._order = max(self._order, order)
