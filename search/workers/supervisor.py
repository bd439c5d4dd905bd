"""The supervisor: starts worker processes, watches them, shows their messages, and sees to an orderly end.

It loads no torch. Ctrl-C once: running trials finish their epoch, are saved and set back to waiting. Twice, SIGTERM,
or SIGHUP (the terminal closes): they stop at the next step. If a worker dies, its trials are queued again and resume
from their checkpoints; so are those of a worker that hangs: one that has been silent for too long is killed.

Every message is a sign of life, and all come from the thread that trains: a thread of its own would go on beating
while a driver hangs. There is one before each forward pass, with each batch of vision outputs, and with each look of
an idle worker for work. Loading a model sends none, so the limit (`--hang-timeout`, 30 minutes by default) must be
longer than that takes. A wrong kill costs more than a late one: a model of 16 GB comes over a slow network in five
minutes, and a step of it on a CPU takes one.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import TYPE_CHECKING, Any

from search.errors import DatabaseAway, StudyError
from search.processes import is_running
from search.records import LOST
from search.workers.multiprocessing_private import UNGUARDED, UNSEEN
from search.workers.orphans import Orphans
from search.workers.pool import WorkerPool, WorkerProcess
from search.workers.protocol import (
    Display,
    HandOver,
    Idle,
    Job,
    Message,
    Order,
    Progress,
    TrialEnded,
    TrialStarted,
    WorkerFailed,
)
from trainer.events import EpochEnded

if TYPE_CHECKING:
    from search.storage.lifecycle import Unfinished

MAX_DEATHS = 5
"""Workers that may die one after the other, no epoch or trial ending in between, before the search gives up: more than
the three attempts of a trial, so that one which kills its worker does not end the search."""
END_S = 60.0
"""The limit of silence after a request to stop now, in seconds: the user should not have to wait longer either."""
PAUSE_S = 5.0
"""Seconds between two rounds that show that the supervisor itself was stopped (Ctrl-Z), and so were its workers."""
LOOK_S = 30.0
"""Seconds between two looks for trials that another host has lost."""
IDLE_LOOK_S = 2.0
"""The same while all workers are idle."""
REFRESH_S = 0.5
AT_ONCE = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a search at the next step, with exit code 128 and their number."""

log = logging.getLogger("search.workers.supervisor")


@dataclass
class WorkerSlot:
    """A place for a worker, and the process that has it now."""

    index: int
    process: WorkerProcess
    link: Connection
    failure: WorkerFailed | None = None
    """Why it cannot continue, by its own account."""
    running: set[int] = field(default_factory=set)
    """Numbers of its trials."""
    link_closed: bool = False
    """Whether its end of the pipe is closed: waiting for that would return at once."""
    idle: bool = False
    """Whether it has no trial, and the study none for it."""
    asked: bool = False
    """Whether it was asked to hand trials over, and has had the same trials since."""
    heard: float = field(default_factory=time.monotonic)
    """When it last gave a sign of life."""


class Supervisor:
    """Runs a job on a number of worker processes."""

    def __init__(
        self,
        job: Job,
        pool: WorkerPool,
        *,
        timeout_s: float | None,
        hang_timeout_s: float,
        display: Display,
        look: Callable[[Collection[int]], Unfinished],
        trial_ended: Callable[[], None],
    ) -> None:
        """Set up; `run` starts the workers.

        Args:
            job: What each worker is given.
            pool: The processes, started already.
            timeout_s: Seconds after which running trials finish their epoch and wait to be resumed.
            hang_timeout_s: Seconds of silence after which a worker is killed and replaced.
            display: Where messages are shown.
            look: Fails the trials of workers that are gone, here or on other hosts, and queues them again; returns how
                many trials are then waiting and running. It is given the numbers of the trials that a death may be
                due to.
            trial_ended: Called after each trial that ended.
        """
        self.job = job
        self.display = display
        self.timed_out = False
        self._pool = pool
        self._find = look
        self._trial_ended = trial_ended
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._hang_timeout_s = hang_timeout_s
        self._looked = time.monotonic()
        self._awake = time.monotonic()
        self._workers: list[WorkerSlot] = []
        self._orphans = Orphans()
        self._order = Order.GO_ON
        self._signals: list[int] = []
        self._untold: list[str] = []
        self._deaths = 0
        self._blamed: set[int] = set()
        """Trials of workers that died alone, until a look has noted them."""
        self._waits_for_others = False

    def run(self) -> int:
        """Run until the study is done, the time is up or someone interrupts; returns the exit code."""
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # others can set no handlers, and `stop` instead
            for number in (signal.SIGINT, *AT_ONCE):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # under nohup it stays so
                    before[number] = signal.signal(number, self._signalled)
        try:
            for index in range(self._pool.size):
                self._start(index)
            code = self._watch()
        finally:
            self._stop_all()
            self._tell()
            for caught, handler in before.items():
                # A terminal that closes may send it twice, the second time while the study is being closed.
                twice = caught == signal.SIGHUP and caught in self._signals
                signal.signal(caught, signal.SIG_IGN if twice else handler)
        for number in AT_ONCE:
            if number in self._signals:
                return 128 + number
        return 130 if self._signals else code

    def stop(self, *, now: bool = False) -> None:
        """End after the running epochs, as Ctrl-C does; `now` at the next step, as Ctrl-C again. From any thread."""
        self._signalled(signal.SIGINT)
        if now and len(self._signals) < 2:
            self._signalled(signal.SIGINT)

    def _start(self, index: int, one_by_one: int = 0) -> None:
        process, link = self._pool.take(index)
        with suppress(OSError):  # it is dead already; `_watch` sees it
            link.send(replace(self.job, one_by_one=one_by_one))
        self._workers.append(WorkerSlot(index, process, link))

    def _watch(self) -> int:
        """Go round until no worker is left; returns the exit code, signals aside."""
        code = 0
        while self._workers:
            # Sleep until a worker sends or ends.
            waited: list[Any] = [slot.process.sentinel for slot in self._workers]
            waited += [slot.link for slot in self._workers if not slot.link_closed]
            wait(waited, timeout=REFRESH_S)
            # What happened to each.
            self._tell()
            self._forgive_a_pause()
            self._orphans.kill_hung()
            for slot in list(self._workers):
                self._read(slot)
                if not slot.process.is_alive():
                    self._read(slot)  # its last messages
                    self._workers.remove(slot)
                    code = max(code, self._ended(slot))
                else:
                    self._kill_if_hung(slot)
            # What is to be done by all.
            self._check_time()
            self._look(LOOK_S)
            self._share_out()
            self._pass_on()
            self.display.refresh()
        return code

    def _read(self, slot: WorkerSlot) -> None:
        try:
            while slot.link.poll():
                message: Message = slot.link.recv()
                slot.heard = time.monotonic()
                self._note(slot, message)
                self.display(message)
        except (EOFError, OSError):  # it ends; its exit code says how
            slot.link_closed = True

    def _note(self, slot: WorkerSlot, message: Message) -> None:
        """Note what a message says about its worker."""
        match message:
            case WorkerFailed():
                slot.failure = message
            case Idle():
                slot.idle = True
            case TrialStarted():
                slot.running.add(message.number)
                slot.idle = slot.asked = False
            case Progress(event=EpochEnded(), from_checkpoint=False):
                self._deaths = 0
            case TrialEnded():
                if message.state != "FAIL":  # a host on which trials fail and workers die is broken
                    self._deaths = 0
                slot.running.discard(message.number)
                slot.asked = False  # what was asked for went by the trials that it had
                if message.state == "WAITING":
                    for other in self._workers:
                        if other is not slot:
                            self._send(other, Order.GO_ON)  # it looks for trials again
                            other.idle = False
                self._trial_ended()

    def _send(self, slot: WorkerSlot, what: Order | HandOver) -> None:
        with suppress(OSError):  # it is ending already
            slot.link.send(what)

    def _share_out(self) -> None:
        """Have a worker without trials take over some of the busiest one's; end all once none has any."""
        idle = [slot for slot in self._workers if slot.idle]
        if not idle or self._order != Order.GO_ON:
            return
        if len(idle) == len(self._workers):
            self._end_unless_others_run(idle)
            return
        busiest = max((slot for slot in self._workers if not slot.idle), key=lambda slot: len(slot.running))
        if len(busiest.running) > 1 and not busiest.asked:
            busiest.asked = True
            self._send(busiest, HandOver())

    def _end_unless_others_run(self, idle: list[WorkerSlot]) -> None:
        """End idle workers once no trial is left anywhere: until then another host may be lost, or set trials back."""
        left = self._look(IDLE_LOOK_S)
        if left is None:
            return
        if not left.waiting and not left.running:
            for slot in idle:
                self._send(slot, Order.END_AFTER_EPOCH)
        elif left.running and not self._waits_for_others:
            self._waits_for_others = True
            self.display.say(
                f"No trials left to start; waiting for {left.running} running elsewhere (they resume here if lost)."
            )

    def _look(self, every_s: float) -> Unfinished | None:
        """Look for lost trials if the last look is `every_s` seconds ago; what was found, None if nothing new."""
        if time.monotonic() - self._looked < every_s:
            return None
        try:
            found = self._find(frozenset(self._blamed))
            self._blamed.clear()
            return found
        except Exception:  # the next look may get through; workers that need the database say so themselves
            log.exception("could not look for lost trials")
            return None
        finally:
            self._looked = time.monotonic()

    def _forgive_a_pause(self) -> None:
        """Do not count time against the workers in which the supervisor itself did not run."""
        now = time.monotonic()
        if now - self._awake > PAUSE_S:
            for slot in self._workers:
                slot.heard += now - self._awake
        self._awake = now

    def _kill_if_hung(self, slot: WorkerSlot) -> None:
        silence_s = time.monotonic() - slot.heard
        limit_s = min(self._hang_timeout_s, END_S) if self._order == Order.END_NOW else self._hang_timeout_s
        if silence_s <= limit_s:
            return
        log.error("worker %d (process %s) hangs", slot.index, slot.process.pid)
        self.display.say(f"Worker {slot.index} has been silent for {silence_s:.0f} s; killing it.")
        slot.process.kill()  # SIGKILL, since a process that is stopped takes no other
        slot.heard = time.monotonic()

    def _ended(self, slot: WorkerSlot) -> int:
        """Deal with a worker that has ended; the exit code this asks for."""
        exit_code = slot.process.exitcode or 0
        if exit_code == UNSEEN and slot.process.pid is not None and is_running(slot.process.pid):
            return self._out_of_sight(slot)
        slot.link.close()
        slot.process.close()
        if exit_code == DatabaseAway.exit_code:
            self._order = Order.END_AFTER_EPOCH
            return exit_code  # what is waiting cannot be known now; the next search will look
        if exit_code == UNGUARDED:
            return self._unguarded()
        if exit_code not in (0, UNSEEN) and slot.failure is None and self._order != Order.END_NOW:
            # It died alone. Not so if all are being ended, or the process that it was forked from died with it.
            self._blamed |= slot.running
        left = self._look(0)
        if slot.failure is not None:
            # A mistake of the user's, or a fault that will be the same for every worker: end all of them.
            self._order = Order.END_AFTER_EPOCH
            return exit_code or 1
        if exit_code == 0:
            if left and left.waiting and not self._workers and self._order == Order.GO_ON:
                self._start(slot.index)  # another worker died and left a trial after this one had ended
            return 0
        return self._died(slot, exit_code)

    def _died(self, slot: WorkerSlot, exit_code: int) -> int:
        """Replace a worker that was killed or crashed, unless too many were; the exit code this asks for."""
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
        log.error("worker %d %s", slot.index, how)
        self._show_lost(slot)
        self._deaths += 1
        if self._deaths >= MAX_DEATHS:
            self.display.say(f"{MAX_DEATHS} workers died without completing an epoch; the last {how}.")
            self._order = Order.END_AFTER_EPOCH
            return 1
        if self._order == Order.GO_ON:
            self.display.say(f"Worker {slot.index} {how}; starting a replacement that resumes its trials.")
            self._start(slot.index, one_by_one=len(slot.running) if len(slot.running) > 1 else 0)
        return 0

    def _show_lost(self, slot: WorkerSlot) -> None:
        """Take the trials of a worker from which nothing more will be heard off the display."""
        gone = TrialEnded(number=0, state="FAIL", reason=LOST, detail="", value=None, findings=(), elapsed_s=0.0)
        for number in sorted(slot.running):
            self.display(replace(gone, number=number))

    def _unguarded(self) -> int:
        """End all: each worker would start a search instead of working for this one."""
        if self._order == Order.GO_ON:
            self.display.say(
                "Workers begin by importing the program's main file, and this one starts a search as it is imported; "
                'put what starts it under `if __name__ == "__main__":`.'
            )
        self._order = Order.END_AFTER_EPOCH
        return StudyError.exit_code

    def _out_of_sight(self, slot: WorkerSlot) -> int:
        """Replace a worker that lives, but whose end can no longer be seen. None of its trials is to blame."""
        log.error("worker %d (process %s) is out of sight", slot.index, slot.process.pid)
        self._show_lost(slot)
        self._orphans.add(slot.process.pid, self._hang_timeout_s)
        slot.link.close()
        slot.process.close()
        if self._order == Order.GO_ON:
            self.display.say(f"Lost track of worker {slot.index}; starting a replacement that resumes its trials.")
            self._start(slot.index)
        return 0

    def _check_time(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline and not self.timed_out:
            self.timed_out = True
            self.display.say("Time is up; running trials finish their epoch and wait to be resumed.")
            self._order = max(self._order, Order.END_AFTER_EPOCH)

    def _pass_on(self) -> None:
        if self._order == Order.GO_ON:
            return
        for slot in self._workers:
            self._send(slot, self._order)

    def _signalled(self, number: int, _frame: FrameType | None = None) -> None:
        self._signals.append(number)
        if number in AT_ONCE or len(self._signals) > 1:
            self._order = Order.END_NOW
            self._untold.append("Stopping at the next step; trials resume from their last completed epoch next time.")
        else:
            self._order = max(self._order, Order.END_AFTER_EPOCH)
            self._untold.append("Finishing the current epoch; interrupt again (Ctrl-C) to stop at the next step.")

    def _tell(self) -> None:
        """Show what came up in a signal's handler, which may have interrupted the display as it wrote."""
        while self._untold:
            self.display.say(self._untold.pop(0))

    def _stop_all(self) -> None:
        """Leave no worker behind."""
        for slot in self._workers:
            slot.process.terminate()
        for slot in self._workers:
            slot.process.join(timeout=10)
            if slot.process.is_alive():
                slot.process.kill()
                slot.process.join()
