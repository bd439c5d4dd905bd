"""Delivering a spool: what MLflow did not take when it was recorded, in order, each thing once.

Whatever is sent may have arrived before, by a call that was not answered: runs are found by their `RECORD_ID` before
they are created, and metrics that a run has already are left out.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from search.errors import StorageError, Unavailable
from search.tracking.client import RECORD_ID, Tracking
from search.tracking.outbox import (
    STUDY,
    Create,
    Damaged,
    Entry,
    File,
    Kept,
    Outbox,
    Resume,
    Study,
    Write,
    count,
    is_local,
)
from search.tracking.recorder import Logged
from search.tracking.run_store import Point
from search.tracking.writer import send

log = logging.getLogger("search.tracking.delivery")


class Delivered(NamedTuple):
    """What one round of delivery did."""

    records: int = 0
    """Metrics, tags, files and events."""
    runs: int = 0
    """Runs of which everything is delivered."""
    rejected: tuple[str, ...] = ()
    """What the store refused for good, a sentence each."""
    busy: bool = False
    """Another process delivers."""


@dataclass
class _Progress:
    """How far a run is delivered."""

    end: int = 0
    """Of the entries in the spool that are."""
    known: bool = False
    """Whether what follows is known. A call that was not answered may have changed it."""
    target: str | None = None
    """MLflow's id of the run."""
    steps: dict[str, int] = field(default_factory=dict)
    """Last step of each metric that the run has."""
    tags: set[str] = field(default_factory=set)
    records: int = 0
    """Delivered so far."""
    rejected: list[str] = field(default_factory=list)


class Delivery:
    """Delivers the undelivered records of a study."""

    def __init__(self, spool: Outbox, study: str, connect: Callable[[], Tracking]) -> None:
        """Set up; `once` delivers.

        Args:
            spool: Where the records are.
            study: The study's name.
            connect: Opens the store, or raises `Unavailable`; asked in every round.
        """
        self.spool, self._study, self._connect = spool, study, connect
        self._progress: dict[str, _Progress] = {}
        self._claim: contextlib.ExitStack | None = None
        """Held as long as a run is delivered in part: another process would begin it again."""

    def once(self) -> Delivered:
        """Deliver all there is, unless another process is doing so.

        A run that the store does not take, while it answers otherwise, does not hold up the others.

        Raises:
            StorageError: the store does not answer, or cannot be used; nothing is lost, and the same call may succeed.
        """
        if not self.spool.runs():
            return Delivered()
        if not self._claimed():
            return Delivered(busy=True)
        try:
            return self._round(self._connect())
        finally:
            if not self._progress:
                self.close()

    def close(self) -> None:
        """Leave what is undelivered to another process, which begins partly delivered runs again."""
        self._progress.clear()
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def _claimed(self) -> bool:
        if self._claim is None:
            with contextlib.ExitStack() as stack:
                if stack.enter_context(self.spool.delivering()):
                    self._claim = stack.pop_all()
        return self._claim is not None

    def _round(self, tracking: Tracking) -> Delivered:
        total = Delivered()
        failed: StorageError | None = None
        for run_id in self.spool.runs():
            progress = self._progress.setdefault(run_id, _Progress())
            before = progress.end
            try:
                total = _sum(total, self._run(tracking, run_id, progress))
            except StorageError as error:
                progress.known = False
                tracking.find_experiment(self._study)  # raises if it is the store, not this run
                failed = failed if progress.end > before else error
        if failed is not None and not total.records:
            raise failed
        return total

    def _run(self, tracking: Tracking, run_id: str, progress: _Progress) -> Delivered:
        """Deliver one run. Rejects are kept apart; other errors leave what is undelivered where it is."""
        if not progress.known:
            self._find(tracking, run_id, progress)
        while True:
            for kept in self.spool.read(run_id, progress.end):
                why = self._entry(tracking, run_id, progress, kept)
                progress.records += count([kept.entry])
                if why is not None:
                    progress.rejected.append(why)
            if self.spool.remove(run_id, progress.end):
                break
        if is_local(run_id):
            tracking.find_record(tracking.experiment(self._study), run_id)  # a second creation that came late
        del self._progress[run_id]
        return Delivered(progress.records, 1, tuple(progress.rejected))

    def _find(self, tracking: Tracking, run_id: str, progress: _Progress) -> None:
        """Find out what the run has."""
        target: str | None = run_id
        logged = Logged()
        if run_id == STUDY:
            target = tracking.some_parent(self._study, {})
        else:
            if is_local(run_id):
                experiment = tracking.find_experiment(self._study)
                target = None if experiment is None else tracking.find_record(experiment, run_id)
            try:
                logged = logged if target is None else tracking.logged(target)
            except Unavailable:
                raise
            except StorageError:  # there is no such run: its entries are refused one by one
                log.warning("the spool has records of run %s, which MLflow does not have", run_id)
        progress.target, progress.steps, progress.tags = target, dict(logged.steps), set(logged.tags)
        progress.known = True

    def _entry(self, tracking: Tracking, run_id: str, progress: _Progress, kept: Kept) -> str | None:
        """Deliver one entry; returns why it was refused for good, if it was."""
        entry = self._fresh(progress, kept.entry)
        try:
            self._send(tracking, run_id, progress, entry)
        except Unavailable:
            raise
        except StorageError as error:
            if isinstance(entry, Create | Study):
                raise  # an experiment that was deleted: it can be restored
            path = self.spool.reject(run_id, [kept.entry], str(error))
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
            raise StorageError("a line of the spool cannot be read")
        if progress.target is None:
            raise StorageError(f"there is no MLflow run {run_id}")
        match entry:
            case Study():
                tracking.parent_run(self._study, entry.tags)
            case Resume():
                tracking.resume_run(progress.target, entry.tags)
            case File():
                path = Path(entry.path)
                if path.is_file():  # otherwise nobody wants it any more
                    tracking.log_artifact(progress.target, path, entry.folder)
            case _:
                send(tracking, progress.target, entry)

    @staticmethod
    def _fresh(progress: _Progress, entry: Entry) -> Entry:
        """The entry without what the run has: a run that went on repeats its checkpoint's history."""
        if not isinstance(entry, Write):
            return entry
        points: list[Point] = []
        steps = dict(progress.steps)
        for point in entry.points:
            if point.step > steps.get(point.key, 0):
                points.append(point)
                steps[point.key] = point.step
        first = {key for key in progress.tags if key.startswith("nonfinite.")} - {"nonfinite.steps"}
        return Write(points=points, tags={key: value for key, value in entry.tags.items() if key not in first})


def _sum(one: Delivered, other: Delivered) -> Delivered:
    return Delivered(one.records + other.records, one.runs + other.runs, one.rejected + other.rejected)
