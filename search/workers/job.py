"""What a worker is given: its job, and its end of the pipe to the supervisor."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from search.study import Study
from search.workers.protocol import Alive, HandOver, Message, Order
from trainer.data.dataset import Examined

LOST_AFTER_S = 600.0
"""A trial of another host is lost after so long without a heartbeat. Beats come from a thread of the worker, not from
its epochs, so this need not grow with the length of an epoch; a short one kills live trials (optuna#5470)."""
ALIVE_S = 1.0
"""Least seconds between two `Alive` messages."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker of a search is given. Picklable: it crosses to a new process."""

    study: Study
    study_name: str
    """Optuna's name, which tells generations apart."""
    storage_url: str = field(repr=False)
    """May hold a password, as the next."""
    tracking_uri: str = field(repr=False)
    runs_dir: Path
    n_trials: int
    strategy: str
    pruner: str
    examined: Examined
    threads: int
    workers: int = 1
    """Of this search."""
    slots: int | None = None
    """Trials that a worker trains at once; None for as many as pay and fit."""
    lost_after_s: float = LOST_AFTER_S
    """Seconds without a heartbeat after which other hosts take the trials over."""
    one_by_one: int = 0
    """Trials to be run alone first: those of a worker that died with several, one of which may have killed it."""

    @property
    def folder(self) -> Path:
        """Where the study's files lie."""
        return self.runs_dir / self.study_name


class Link:
    """The worker's end of the pipe: sends messages, and keeps the highest order received."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._order = Order.GO_ON
        self._told = 0.0
        self.share = False
        """Whether half of the running trials are wanted by a worker that has none."""
        self.look = False
        """Whether another worker has set a trial back to waiting."""

    def send(self, message: Message) -> None:
        """Tell the supervisor. If it is gone, the worker ends at the next step."""
        self._told = time.monotonic()
        try:
            self._connection.send(message)
        except OSError:
            self._order = Order.END_NOW

    def alive(self) -> None:
        """Tell the supervisor that work goes on, unless it has heard something just now."""
        if time.monotonic() - self._told >= ALIVE_S:
            self.send(Alive())

    def order(self) -> Order:
        """What is wanted now. Cheap enough to ask at every step."""
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
        """Until the supervisor says something, or so long."""
        with suppress(EOFError, OSError):
            self._connection.poll(timeout_s)

    def raise_to(self, order: Order) -> None:
        """Take an order, unless a higher one was taken before."""
        self._order = max(self._order, order)
