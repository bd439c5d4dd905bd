"""The supervisor: starts worker processes, watches them, passes on what they say, and sees to an orderly end.

It loads no torch. Ctrl-C once: running trials finish their epoch, are saved and set back to waiting. Twice, or
SIGTERM: they stop at the next step. A worker that dies has its trials queued again, to go on from their checkpoints;
so has one that reports nothing for too long, which is killed.

Every message is a sign of life, and all come from the thread that trains: a thread of its own would go on beating
while a driver hangs. There is one before each forward pass, with each batch of vision outputs, and with each look of
an idle worker for work. Loading a model gives none, so the limit must be longer than that takes.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from search.errors import DatabaseAway
from search.processes import is_running
from search.terminal.live import Display
from search.workers.job import Job
from search.workers.pool import UNSEEN, WorkerPool, WorkerProcess
from search.workers.protocol import EpochDone, HandOver, Idle, Message, Order, TrialEnded, TrialStarted, WorkerFailed

if TYPE_CHECKING:
    from search.storage.lifecycle import Unfinished

MAX_DEATHS = 5
"""Workers that may die one after the other, no epoch or trial ending between, before the search gives up: more than
the three attempts of a trial, so that one which kills its worker does not end the search."""
HANG_S = 1800.0
"""Seconds without a sign of life after which a worker is taken for hung. A wrong kill costs more than a late one: a
model of 16 GB comes over a slow network in five minutes, and a step of it on a CPU takes one."""
END_S = 60.0
"""The same once the end is wanted now: whoever asks for it may wait no longer either."""
PAUSE_S = 5.0
"""Seconds between two rounds from which the supervisor itself was stopped (Ctrl-Z), and so were its workers."""
LOOK_S = 30.0
"""Seconds between two looks for trials that another host has lost."""
IDLE_LOOK_S = 2.0
"""The same while all workers are idle."""
REFRESH_S = 0.5

log = logging.getLogger("search.workers.supervisor")


@dataclass
class WorkerSlot:
    """A place for a worker, and the process that has it now."""

    index: int
    process: WorkerProcess
    link: Connection
    gave: WorkerFailed | None = None
    running: set[int] = field(default_factory=set)
    """Numbers of its trials."""
    closed: bool = False
    """Whether its end of the pipe is closed: waiting for that would not wait."""
    idle: bool = False
    asked: bool = False
    """Whether it was asked to hand trials over, and has not yet done so."""
    heard: float = field(default_factory=time.monotonic)
    """When it last gave a sign of life."""


class Supervisor:
    """Runs a job on a number of worker processes."""

    def __init__(
        self,
        job: Job,
        crew: WorkerPool,
        *,
        timeout_s: float | None,
        display: Display,
        look: Callable[[], Unfinished],
        trial_ended: Callable[[], None],
        hang_timeout_s: float = HANG_S,
    ) -> None:
        """Set up; `run` starts the workers.

        Args:
            job: What each worker is given.
            crew: The processes, started already.
            timeout_s: Seconds after which running trials finish their epoch and wait to be continued.
            display: Where messages are shown.
            look: Fails the trials of workers that are gone, here or on other hosts, and queues them again; returns how
                many trials are then waiting and running.
            trial_ended: Called after each trial that ended.
            hang_timeout_s: Seconds without a sign of life after which a worker is killed and replaced.
        """
        self.job = job
        self._crew = crew
        self.display = display
        self._find = look
        self._looked = time.monotonic()
        self._awake = time.monotonic()
        self._hang_timeout_s = hang_timeout_s
        self._waits_for_others = False
        self._trial_ended = trial_ended
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._seats: list[WorkerSlot] = []
        self._orphans: list[tuple[psutil.Process, float]] = []
        """Workers out of sight, and when they will have had time enough to end."""
        self._order = Order.GO_ON
        self._signals: list[int] = []
        self._deaths = 0
        self.timed_out = False

    def run(self) -> int:
        """Run until the study is done, the time is up or someone interrupts; returns the exit code."""
        before: dict[signal.Signals, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, self._signalled)
        try:
            for index in range(self._crew.size):
                self._start(index)
            code = self._watch()
        finally:
            self._stop_all()
            for caught, handler in before.items():
                signal.signal(caught, handler)
        if signal.SIGTERM in self._signals:
            return 143
        return 130 if self._signals else code

    def _start(self, index: int, one_by_one: int = 0) -> None:
        process, link = self._crew.take(index)
        with suppress(OSError):  # it is dead already; `_watch` sees it
            link.send(replace(self.job, one_by_one=one_by_one))
        self._seats.append(WorkerSlot(index, process, link))

    def _watch(self) -> int:
        """Until no worker is left; the exit code apart from signals."""
        code = 0
        while self._seats:
            waited: list[Any] = [seat.process.sentinel for seat in self._seats]
            waited += [seat.link for seat in self._seats if not seat.closed]
            wait(waited, timeout=REFRESH_S)
            self._forgive_a_pause()
            self._kill_hung_orphans()
            for seat in list(self._seats):
                self._read(seat)
                if not seat.process.is_alive():
                    self._read(seat)  # what it said last
                    self._seats.remove(seat)
                    code = max(code, self._ended(seat))
                else:
                    self._kill_if_hung(seat)
            self._check_time()
            self._look(LOOK_S)
            self._share_out()
            self._pass_on()
            self.display.refresh()
        return code

    def _read(self, seat: WorkerSlot) -> None:
        try:
            while seat.link.poll():
                message: Message = seat.link.recv()
                seat.heard = time.monotonic()
                self._note(seat, message)
                self.display(message)
        except (EOFError, OSError):  # it ends; its exit code says how
            seat.closed = True

    def _note(self, seat: WorkerSlot, message: Message) -> None:
        """What a message says about its worker."""
        match message:
            case WorkerFailed():
                seat.gave = message
            case Idle():
                seat.idle = True
            case TrialStarted():
                seat.running.add(message.number)
                seat.idle = False
            case EpochDone(from_checkpoint=False):
                self._deaths = 0
            case TrialEnded():
                self._deaths = 0
                seat.running.discard(message.number)
                if message.state == "WAITING":
                    seat.asked = False
                    for other in self._seats:
                        if other is not seat:
                            self._send(other, Order.GO_ON)  # it looks for trials again
                            other.idle = False
                self._trial_ended()

    def _send(self, seat: WorkerSlot, what: Order | HandOver) -> None:
        with suppress(OSError):  # it is ending already
            seat.link.send(what)

    def _share_out(self) -> None:
        """Have a worker without trials take over some of the busiest one's; end all once none has any."""
        idle = [seat for seat in self._seats if seat.idle]
        if not idle or self._order != Order.GO_ON:
            return
        if len(idle) == len(self._seats):
            self._end_unless_others_run(idle)
            return
        busiest = max((seat for seat in self._seats if not seat.idle), key=lambda seat: len(seat.running))
        if len(busiest.running) > 1 and not busiest.asked:
            busiest.asked = True
            self._send(busiest, HandOver())

    def _end_unless_others_run(self, idle: list[WorkerSlot]) -> None:
        """End idle workers once no trial is left anywhere: until then another host may be lost, or set trials back."""
        left = self._look(IDLE_LOOK_S)
        if left is None:
            return
        if not left.waiting and not left.running:
            for seat in idle:
                self._send(seat, Order.END_AFTER_EPOCH)
        elif left.running and not self._waits_for_others:
            self._waits_for_others = True
            self.display.say(
                f"nothing is left to start; {left.running} trials run in other processes, and go on here if lost"
            )

    def _look(self, every_s: float) -> Unfinished | None:
        """Look for lost trials if that was not done for so long; what was found, None if nothing new."""
        if time.monotonic() - self._looked < every_s:
            return None
        try:
            return self._find()
        except Exception:  # the next look may get through; workers that need the database say so themselves
            log.exception("could not look for lost trials")
            return None
        finally:
            self._looked = time.monotonic()

    def _forgive_a_pause(self) -> None:
        """Count no time against the workers in which the supervisor itself did not run."""
        now = time.monotonic()
        if now - self._awake > PAUSE_S:
            for seat in self._seats:
                seat.heard += now - self._awake
        self._awake = now

    def _kill_if_hung(self, seat: WorkerSlot) -> None:
        silence_s = time.monotonic() - seat.heard
        limit_s = min(self._hang_timeout_s, END_S) if self._order == Order.END_NOW else self._hang_timeout_s
        if silence_s <= limit_s:
            return
        log.error("worker %d (process %s) hangs", seat.index, seat.process.pid)
        self.display.say(f"worker {seat.index} has given no sign of life for {silence_s:.0f} s and is killed")
        seat.process.kill()  # SIGKILL, since a process that is stopped takes no other
        seat.heard = time.monotonic()

    def _ended(self, seat: WorkerSlot) -> int:
        """Deal with a worker that has ended; the exit code this asks for."""
        exit_code = seat.process.exitcode or 0
        if exit_code == UNSEEN and seat.process.pid is not None and is_running(seat.process.pid):
            return self._out_of_sight(seat)
        seat.link.close()
        seat.process.close()
        if exit_code == DatabaseAway.exit_code:
            self._order = Order.END_AFTER_EPOCH
            return exit_code  # nobody can be asked what is waiting; the next search will be
        left = self._look(0)
        if seat.gave is not None:
            # A mistake of the user's, or a fault that will be the same for every worker: end all of them.
            self._order = Order.END_AFTER_EPOCH
            return exit_code or 1
        if exit_code == 0:
            if left and left.waiting and not self._seats and self._order == Order.GO_ON:
                self._start(seat.index)  # another worker died and left a trial after this one had ended
            return 0
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
        log.error("worker %d %s", seat.index, how)
        self._deaths += 1
        if self._deaths >= MAX_DEATHS:
            self.display.say(f"{MAX_DEATHS} workers died, no epoch ending between; the last {how}")
            self._order = Order.END_AFTER_EPOCH
            return 1
        if self._order == Order.GO_ON:
            self.display.say(f"worker {seat.index} {how}; another takes its place, its trials go on")
            self._start(seat.index, one_by_one=len(seat.running) if len(seat.running) > 1 else 0)
        return 0

    def _check_time(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline and not self.timed_out:
            self.timed_out = True
            self.display.say("the time is up: running trials finish their epoch and wait to be continued")
            self._order = max(self._order, Order.END_AFTER_EPOCH)

    def _pass_on(self) -> None:
        if self._order == Order.GO_ON:
            return
        for seat in self._seats:
            self._send(seat, self._order)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)
        if number == signal.SIGTERM or len(self._signals) > 1:
            self._order = Order.END_NOW
            self.display.say("stopping at the next step; the trial goes on from its last whole epoch next time")
        else:
            self._order = max(self._order, Order.END_AFTER_EPOCH)
            self.display.say("finishing the current epoch; once more to stop at the next step")

    def _out_of_sight(self, seat: WorkerSlot) -> int:
        """A worker lives whose end could not be seen any more: the process that it was forked from was killed.

        It reads the end of the pipe, sets its trials back to waiting and ends. None of them is to blame.
        """
        pid = seat.process.pid
        log.error("worker %d (process %s) is out of sight", seat.index, pid)
        self._orphans.append((psutil.Process(pid), time.monotonic() + self._hang_timeout_s))
        seat.link.close()
        seat.process.close()
        if self._order == Order.GO_ON:
            self.display.say(f"worker {seat.index} is out of sight; another takes its place, its trials go on")
            self._start(seat.index)
        return 0

    def _kill_hung_orphans(self) -> None:
        for orphan, until in list(self._orphans):
            if not orphan.is_running() or time.monotonic() > until:
                with suppress(psutil.NoSuchProcess):
                    orphan.kill()
                self._orphans.remove((orphan, until))

    def _stop_all(self) -> None:
        """No worker outlives its supervisor."""
        for seat in self._seats:
            seat.process.terminate()
        for seat in self._seats:
            seat.process.join(timeout=10)
            if seat.process.is_alive():
                seat.process.kill()
                seat.process.join()
