"""Delivery of an outbox: what MLflow did not take when it was recorded, in order, each thing once.

Whatever is sent may have arrived before, by a call that was not answered: runs are found by their `RECORD_ID` before
they are created, and metrics that a run already has are left out.

`Delivery` does it; `DeliveryThread` does it while the search runs, and says when MLflow is away and when it is back.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from search.errors import StorageError, Unavailable
from search.tracking.client import Tracking
from search.tracking.outbox import (
    CAPTIONS,
    STUDY,
    Create,
    Damaged,
    Entry,
    Kept,
    Outbox,
    Point,
    Resume,
    StudyBegun,
    Write,
    count,
    is_local,
)
from search.tracking.recorder import Logged
from search.tracking.tags import RECORD_ID
from search.tracking.writer import send

log = logging.getLogger("search.tracking.delivery")

POLL_S = 1.0
"""How soon records that come into the outbox are seen."""
MAX_PAUSE_S = 30.0
"""Longest pause between two tries while the store is away."""
FINAL_S = 10.0
"""How long a search that has ended still tries."""


class Delivered(NamedTuple):
    """What one round of delivery did."""

    records: int = 0
    """Metrics, tags, files and events."""
    runs: int = 0
    """Runs of which everything is delivered."""
    rejected: tuple[str, ...] = ()
    """What the store refused for good, a sentence each."""
    busy: bool = False
    """Another process is delivering."""


@dataclass
class _Progress:
    """How much of a run is delivered."""

    end: int = 0
    """Offset in the run's file up to which entries have been delivered."""
    known: bool = False
    """Whether the three values below are known. A call that was not answered may have changed them."""
    target: str | None = None
    """MLflow's id of the run."""
    steps: dict[str, int] = field(default_factory=dict)
    """Last step of each metric that the run has."""
    in_any_order: bool = False
    """Whether its metrics' steps are no steps of a training."""
    tags: set[str] = field(default_factory=set)
    records: int = 0
    """Metrics, tags, files and events delivered so far."""
    rejected: list[str] = field(default_factory=list)


class Delivery:
    """Delivers the undelivered records of a study."""

    def __init__(self, outbox: Outbox, study: str, connect: Callable[[], Tracking]) -> None:
        """Set up; `once` delivers.

        Args:
            outbox: Where the records are.
            study: The study's name.
            connect: Opens the store, or raises `Unavailable`; asked in every round.
        """
        self.outbox, self._study, self._connect = outbox, study, connect
        self._progress: dict[str, _Progress] = {}
        self._done = Delivered()
        """What was done in rounds that ended in an error: `once` has still to return it."""
        self._claim: contextlib.ExitStack | None = None
        """Held while a run is partly delivered: another process would deliver it from the beginning."""

    def once(self) -> Delivered:
        """Deliver everything there is, unless another process is doing so.

        A run that the store does not take, although it answers, does not hold up the others.

        Raises:
            StorageError: the store does not answer, or cannot be used; nothing is lost, and the same call may succeed.
        """
        if not self.outbox.runs():
            self.close()  # what was partly delivered is gone with its file
        elif not self._claimed():
            return Delivered(busy=True)
        else:
            try:
                self._round(self._connect())
            finally:
                if not self._progress:
                    self.close()
        done, self._done = self._done, Delivered()
        return done

    def close(self) -> None:
        """Leave what is undelivered to another process, which delivers partly delivered runs from the beginning."""
        self._progress.clear()
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def _claimed(self) -> bool:
        if self._claim is None:
            with contextlib.ExitStack() as stack:
                if stack.enter_context(self.outbox.delivering()):
                    self._claim = stack.pop_all()
        return self._claim is not None

    def _round(self, tracking: Tracking) -> None:
        failed: StorageError | None = None
        runs = self.outbox.runs()
        for gone in self._progress.keys() - set(runs):
            del self._progress[gone]
        for run_id in runs:
            progress = self._progress.setdefault(run_id, _Progress())
            before = progress.end
            try:
                self._done = _sum(self._done, self._run(tracking, run_id, progress))
            except StorageError as error:
                progress.known = False
                tracking.find_experiment(self._study)  # raises if it is the store, not this run
                failed = failed if progress.end > before else error
        if failed is not None and not self._done.records:
            raise failed

    def _run(self, tracking: Tracking, run_id: str, progress: _Progress) -> Delivered:
        """Deliver one run. Entries that are refused are kept apart; other errors leave the rest in the outbox.

        The file is removed last, and its progress is forgotten with it: a trial that still trains begins another file.
        """
        if not progress.known:
            self._find(tracking, run_id, progress)
        while True:
            for kept in self.outbox.read(run_id, progress.end):
                why = self._entry(tracking, run_id, progress, kept)
                progress.records += count([kept.entry])
                if why is not None:
                    progress.rejected.append(why)
            if is_local(run_id):
                self._delete_second(tracking, run_id)
            if self.outbox.remove(run_id, progress.end):
                del self._progress[run_id]
                return Delivered(progress.records, 1, tuple(progress.rejected))

    def _delete_second(self, tracking: Tracking, run_id: str) -> None:
        """Delete a second run: a creation that was not answered may have succeeded late."""
        try:
            self._record(tracking, run_id)
        except Unavailable:
            raise
        except StorageError as error:  # all of the run is delivered; a second one in the lists is the lesser harm
            log.warning("run %s may be there twice: %s", run_id, error)

    def _record(self, tracking: Tracking, run_id: str) -> str | None:
        """MLflow's id of a run that began in the outbox, None if it has none yet."""
        experiment = tracking.find_experiment(self._study)
        return None if experiment is None else tracking.find_record(experiment, run_id)

    def _find(self, tracking: Tracking, run_id: str, progress: _Progress) -> None:
        """Find out what MLflow has of the run."""
        target: str | None = run_id
        logged = Logged()
        if run_id == STUDY:
            target = tracking.some_parent(self._study, {})
        else:
            if is_local(run_id):
                target = self._record(tracking, run_id)
            try:
                logged = logged if target is None else tracking.logged(target)
            except Unavailable:
                raise
            except StorageError:  # there is no such run: its entries are refused one by one
                log.warning("the outbox has records of run %s, which MLflow does not have", run_id)
        progress.target, progress.steps, progress.tags = target, dict(logged.steps), set(logged.tags)
        progress.in_any_order = run_id == STUDY
        progress.known = True

    def _entry(self, tracking: Tracking, run_id: str, progress: _Progress, kept: Kept) -> str | None:
        """Deliver one entry; returns why it was refused for good, if it was."""
        entry = self._fresh(progress, kept.entry)
        try:
            self._send(tracking, run_id, progress, entry)
        except Unavailable:
            raise
        except StorageError as error:
            if isinstance(entry, Create | StudyBegun):
                raise  # an experiment that was deleted: it can be restored
            path = self.outbox.reject(run_id, [kept.entry], str(error))
            progress.end = kept.end
            return f"{error}; kept in {path}"
        progress.end = kept.end
        if isinstance(entry, Write):
            progress.tags |= entry.tags.keys()
            for point in entry.points:
                progress.steps[point.key] = max(point.step, progress.steps.get(point.key, 0))
        return None

    def _send(self, tracking: Tracking, run_id: str, progress: _Progress, entry: Entry) -> None:
        if isinstance(entry, Create):
            if progress.target is None:
                experiment = tracking.experiment(self._study)
                parent = tracking.some_parent(self._study, {})
                tags = {**entry.tags, RECORD_ID: run_id}
                progress.target = tracking.create_trial(
                    experiment, parent, entry.name, entry.params, tags, entry.start_ms
                )
            else:
                tracking.set_params(progress.target, entry.params)
            return
        if isinstance(entry, Damaged):
            raise StorageError("a line of the outbox cannot be read")
        if progress.target is None:
            raise StorageError(f"there is no MLflow run {run_id}")
        match entry:
            case StudyBegun():
                tracking.parent_run(self._study, entry.tags, entry.params)
            case Resume():
                tracking.resume_run(progress.target, entry.tags)
            case _:
                send(tracking, progress.target, entry)

    @staticmethod
    def _fresh(progress: _Progress, entry: Entry) -> Entry:
        """The entry without what the run already has: a run that is resumed repeats its checkpoint's history.

        Of metrics whose steps are not those of training nothing is left out: the study's run has a point a trial, in
        the order in which they end, and captions may be scored again. MLflow keeps equal points once.
        """
        if not isinstance(entry, Write):
            return entry
        points: list[Point] = []
        steps = dict(progress.steps)
        for point in entry.points:
            if progress.in_any_order or point.key.startswith(CAPTIONS) or point.step > steps.get(point.key, 0):
                points.append(point)
                steps[point.key] = point.step
        first = {key for key in progress.tags if key.startswith("nonfinite.")} - {"nonfinite.steps"}
        return Write(points=points, tags={key: value for key, value in entry.tags.items() if key not in first})


def _sum(one: Delivered, other: Delivered) -> Delivered:
    return Delivered(one.records + other.records, one.runs + other.runs, one.rejected + other.rejected)


class DeliveryThread(threading.Thread):
    """Delivers what comes into the outbox, with growing pauses while the store is away."""

    def __init__(self, delivery: Delivery, where: str, say: Callable[[str], None]) -> None:
        """Set up; `start` starts.

        Args:
            delivery: Delivers the study's outbox.
            where: The store's address as it may be shown.
            say: Shows the user a message.
        """
        super().__init__(name="delivery", daemon=True)
        self._delivery, self._where, self._say = delivery, where, say
        self._closing = threading.Event()
        self._said_away = False
        self._since = 0.0
        self._records = 0

    def start(self, away: str | None = None) -> None:
        """Begin. `away` is why the store has not answered so far, if it has not."""
        if away is not None:
            self._away(away)
        super().start()

    def run(self) -> None:
        """The thread's work."""
        pause = POLL_S
        while not self._closing.wait(pause):
            pause = POLL_S if self.deliver() is None else min(MAX_PAUSE_S, pause * 2)

    def deliver(self) -> str | None:
        """Deliver once; returns why the store did not take the records, None if it did."""
        try:
            done = self._delivery.once()
        except StorageError as error:
            self._away(str(error))
            return str(error)
        except Exception as error:  # a fault of ours must not end the thread: the records are safe where they are
            log.exception("delivery of the outbox failed")
            self._away(f"{type(error).__name__}: {error}")
            return str(error)
        self._count(done)
        return None

    def close(self, for_s: float | None = None) -> str | None:
        """Try for `for_s` seconds, by default `FINAL_S`; returns a message for the user if something is left.

        May be called again, to deliver what was added after the first call.
        """
        self._closing.set()
        if self.is_alive():
            self.join()
        deadline = time.monotonic() + (FINAL_S if for_s is None else for_s)
        pause = 0.5
        while True:
            why = self.deliver()
            runs = len(self._delivery.outbox.runs())
            if not runs or time.monotonic() + pause > deadline:
                break
            time.sleep(pause)
            pause *= 2
        self._delivery.close()
        if not runs:
            return None
        return f"records of {runs} runs are not delivered yet: {why or 'another process is delivering them'}"

    def _away(self, why: str) -> None:
        if not self._said_away:
            self._said_away, self._since, self._records = True, time.monotonic(), 0
            log.warning("MLflow is away: %s", why)
            self._say(
                f"MLflow ({self._where}) does not take records now: {why}; training continues, and they are kept in "
                f"{self._delivery.outbox.folder} until it does"
            )

    def _count(self, done: Delivered) -> None:
        for why in done.rejected:
            log.error("refused by MLflow: %s", why)
            self._say(f"MLflow refuses a record: {why}")
        self._records += done.records
        if self._said_away and not self._delivery.outbox.runs():
            away_s = time.monotonic() - self._since
            self._said_away = False
            self._say(f"MLflow answers again after {away_s:.0f} s; {self._records} records were delivered")
