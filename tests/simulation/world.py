"""What a simulated search runs on: hosts, processes, a clock, a disk, and a database that fails.

Processes are threads of which one runs at a time. It gives way at every transaction it has ended and in every wait;
who goes on, who is killed, what fails and when is drawn from one seed, so a schedule comes again. A process that is
killed gets no further: whatever it touches then raises `Killed`, clean-up code included.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from trainer.checkpoint import superseded

if TYPE_CHECKING:
    from tests.simulation.threads import Task

START_S = 1_800_000_000.0
"""When a schedule begins."""
GIVE_WAY = 0.2
"""Chance that a process gives way after a transaction."""


class Killed(BaseException):
    """The process gets no further. Not an Exception: no handler of ours may survive it."""


@dataclass(eq=False)
class Host:
    """A container or machine: names repeat, as those of containers do."""

    name: str
    namespace: str
    boot: int = 0
    pids: int = 100
    """Counts up within a boot; the numbers of an earlier boot come again."""
    asleep_until: float = 0.0
    """Its processes stand still until then, heartbeats included."""


@dataclass(eq=False)
class Process:
    """One process; a worker's has a thread."""

    world: World
    host: Host
    pid: int
    boot: int
    dead: bool = False
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None

    def check(self) -> None:
        """Raises Killed if it is dead."""
        if self.dead:
            raise Killed

    def give_way(self) -> None:
        """Let the schedule decide who goes on."""
        self.check()
        task = getattr(self.world.local, "task", None)
        if task is not None:
            task.give_way()
            return
        if self.thread is threading.current_thread():
            self.world.back.release()
            self.go.acquire()
            self.check()


class World:
    """See the module."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.back = threading.Semaphore(0)
        self.local = threading.local()
        self.processes: list[Process] = []
        self.tasks: list[Task] = []
        """Threads of processes beside their first."""
        self.errors: list[BaseException] = []
        """By which such a thread ended."""
        self.beats: dict[int, float] = {}
        """When each trial (by its id in the database) was last heard of."""
        self.away_until = -1.0
        """Until then every transaction fails."""
        self.flaky = 0.0
        """Chance that a transaction fails, done or not."""
        self.deadly = 0.0
        """Chance that a process is killed in a transaction, before or after it is done."""
        self.holder: Process | None = None
        self.disk: dict[str, dict[int, Checkpoint]] = {}
        """Checkpoints by epoch, of each trial's folder."""
        self.trained = 0
        """Epochs computed by anyone."""

    # Processes.

    def process(self, host: Host) -> Process:
        """A new process on a host."""
        host.pids += 1
        self.processes.append(Process(self, host, host.pids, host.boot))
        return self.processes[-1]

    @property
    def current(self) -> Process | None:
        """The process that runs; None for the schedule itself."""
        return getattr(self.local, "process", None)

    @contextmanager
    def acting(self, process: Process) -> Iterator[None]:
        """What is done within is done by this process, which has no thread."""
        self.local.process = process
        try:
            yield
        finally:
            self.local.process = None

    def lives(self, host: Host, pid: int) -> bool:
        """Whether a host has a process of this id now."""
        return any(p.host is host and p.pid == pid and p.boot == host.boot and not p.dead for p in self.processes)

    def today(self) -> float:
        """Seconds since 1970."""
        return START_S + self.now

    def sleep(self, seconds: float) -> None:
        """Of the running process: time goes on, others may."""
        self.now += seconds
        if self.current is not None:
            self.current.give_way()

    # Database.

    def commit(self, session: Session, real: Any) -> None:
        """A transaction's end, which may fail, or kill whoever ends it."""
        process = self.current
        if process is None:
            real(session)
            return
        if process.dead or self.chance.random() < self.deadly:
            done = not process.dead and self.chance.random() < 0.5
            process.dead = True
            real(session) if done else session.rollback()
            raise Killed
        if self.now < self.away_until or self.chance.random() < self.flaky:
            if self.now >= self.away_until and self.chance.random() < 0.5:
                real(session)
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))
        real(session)
        if process.thread is not None and self.chance.random() < GIVE_WAY:
            process.give_way()

    @contextmanager
    def lock(self, *_arguments: Any, **_options: Any) -> Iterator[None]:
        """The database's lock; a process that dies gives it up."""
        process = self.current
        while self.holder is not None and self.holder is not process:
            if self.holder.host.asleep_until > self.now:
                self.now += 1.0  # or time would stand still while all wait for a host that sleeps
            if process is not None and process.thread is not None:
                process.give_way()
            else:  # who has no thread waits by letting the holder go on
                self.holder.go.release()
                self.back.acquire()
        self.holder = process
        try:
            yield
        finally:
            self.holder = None


@dataclass(frozen=True)
class Checkpoint:
    """A trial's state after an epoch: it says all that came before."""

    losses: tuple[float, ...]
    state: str
    sound: bool = True

    @property
    def best(self) -> int:
        """The epoch of the lowest loss."""
        return min(range(len(self.losses)), key=self.losses.__getitem__) + 1


def trained(config: dict[str, Any], before: Checkpoint | None) -> Checkpoint:
    """An epoch of training: what comes out depends on the configuration and on all that was trained before."""
    told = {name: value for name, value in sorted(config.items()) if name not in ("data", "model")}
    state = hashlib.sha256(f"{before.state if before else ''}{told}".encode()).hexdigest()
    losses = before.losses if before else ()
    return Checkpoint((*losses, 1 / (2 + len(losses)) + int(state[:8], 16) / 2**36), state)


def whole(config: dict[str, Any], epochs: int) -> tuple[float, ...]:
    """The losses of a training that nothing disturbed."""
    at: Checkpoint | None = None
    for _ in range(epochs):
        at = trained(config, at)
    return at.losses if at else ()


def save(world: World, folder: Path, made: Checkpoint, last: int) -> None:
    """Write a checkpoint and drop those that `trainer.checkpoint` drops."""
    there = world.disk.setdefault(folder.as_posix(), {})
    epoch = len(made.losses)
    there[epoch] = made
    for each in superseded(there, epoch, made.best, final=epoch >= last):
        del there[each]


def load(world: World, folder: Path) -> Checkpoint | None:
    """The latest sound checkpoint."""
    there = world.disk.get(folder.as_posix(), {})
    sound = [epoch for epoch in there if there[epoch].sound]
    return there[max(sound)] if sound else None
