"""`Writer`: writes what is recorded of a run, from a thread of its own: to the store or, while it is away, to disk."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from search.errors import StorageError, Unavailable
from search.tracking.outbox import (
    DataUsed,
    End,
    Entry,
    File,
    Model,
    Outbox,
    Point,
    Status,
    Text,
    Write,
    count,
)

PAUSE_S = 2.0
"""Seconds between two writes of a run, at least: a call of MLflow's costs as much as a hundred metrics, and epochs of
small models are shorter than this. A kill -9 costs no epoch for it, since a run that goes on is given its checkpoint's
history, but the step metrics of these seconds."""


class RunStore(Protocol):
    """Where runs are written. Every method may raise `Unavailable` (try again) or `StorageError` (don't).

    Writing the same point twice must leave one: a write that failed may have succeeded, and is done again.
    """

    def write(self, run_id: str, points: Iterable[Point], tags: Mapping[str, str]) -> None: ...
    def log_text(self, run_id: str, text: str, file: str) -> None: ...
    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None: ...
    def log_data(self, run_id: str, data: DataUsed) -> None: ...
    def keep_model(self, run_id: str, model: Model) -> None: ...
    def end_run(
        self, run_id: str, status: Status, tags: Mapping[str, str], description: str, end_ms: int | None = None
    ) -> None: ...


class Writer(threading.Thread):
    """Writes what is put to it, in order, from a thread of its own.

    `put` never waits. What the store does not take goes to the outbox, which is delivered when the store is back;
    until all of the run is delivered, everything goes there, so that the order is kept. What the store refuses for
    good is kept beside it. Without an outbox both are counted as lost, and `close` returns how many; without a store,
    everything goes to the outbox.
    """

    def __init__(self, store: RunStore | None, run_id: str, flush_s: float, outbox: Outbox | None = None) -> None:
        super().__init__(name=f"tracking-{run_id[-8:]}", daemon=True)
        self._store, self._run_id, self._flush_s, self._outbox = store, run_id, flush_s, outbox
        self._changed = threading.Condition()
        self._points: list[Point] = []
        self._tags: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._others: list[File | DataUsed] = []
        self._end: End | None = None
        self._due = False
        self._closing = False
        self._abandoned = False
        self.problem: str | None = None
        """Why the latest write went to the outbox or was refused, None while all is well."""
        self.lost = 0
        """Metrics, tags and files that are nowhere."""
        self.cpu_s = 0.0
        """Processor time spent writing: what recording takes from a training that shares the processor."""

    def put(
        self,
        points: Iterable[Point] = (),
        tags: Mapping[str, str] | None = None,
        texts: Mapping[str, str] | None = None,
        others: Iterable[File | DataUsed] = (),
        *,
        now: bool = False,
    ) -> None:
        """Queue values, written within `flush_s` seconds; if `now`, at once or `PAUSE_S` after the last write."""
        with self._changed:
            self._points.extend(points)
            self._tags.update(tags or {})
            self._texts.update(texts or {})
            self._others.extend(others)
            if now and not self._due:
                self._due = True
                self._changed.notify()

    def close(self, end: End, timeout_s: float) -> int:
        """Write what is queued, then the end of the run. Returns how many metrics, tags and files are lost.

        A store that hangs for `timeout_s` seconds is not waited for: what it has not taken goes to the outbox.
        """
        with self._changed:
            self._end, self._closing = end, True
            self._changed.notify()
        self.join(timeout_s)
        if self.is_alive():
            with self._changed:
                self._abandoned = True
            self.problem = f"no answer for {timeout_s:.0f} s"
            self._keep(self._queued())
        return self.lost

    def run(self) -> None:
        """The thread's work."""
        written = -math.inf
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._due, self._flush_s)
                self._changed.wait_for(lambda: self._closing, max(0.0, written + PAUSE_S - time.monotonic()))
                self._due, last = False, self._closing
            began = time.thread_time()
            self._drain()
            self.cpu_s += time.thread_time() - began
            written = time.monotonic()
            if last or self._abandoned:
                return

    def _drain(self) -> None:
        """Write all that is queued, somewhere."""
        entries = self._queued()
        if self._store is None or self._pending():
            self._keep(entries)
            return
        for entry in entries:
            try:
                send(self._store, self._run_id, entry)
                self.problem = self.problem if self.lost else None  # what was lost for good remains the problem
            except Unavailable as error:
                if self._abandoned:
                    return
                self.problem = str(error)
                self._keep(entries[entries.index(entry) :])
                return
            except Exception as error:  # noqa: BLE001 - not swallowed: kept or counted, and `problem` says so
                why = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
                self._refused(entry, why)
            if self._abandoned:
                return
            self._done([entry])

    def _pending(self) -> bool:
        """Whether earlier entries of the run are still to be delivered."""
        return self._outbox is not None and self._outbox.holds(self._run_id)

    def _queued(self) -> list[Entry]:
        with self._changed:
            entries: list[Entry] = []
            if self._points or self._tags:
                entries.append(Write(points=list(self._points), tags=dict(self._tags)))
            entries += [Text(text=text, file=file) for file, text in self._texts.items()]
            entries += self._others
            if self._end is not None:
                entries.append(self._end)
            return entries

    def _done(self, entries: list[Entry]) -> None:
        """Take from the queue what is written or kept."""
        with self._changed:
            for entry in entries:
                match entry:
                    case Write():
                        del self._points[: len(entry.points)]
                        self._tags = {k: v for k, v in self._tags.items() if entry.tags.get(k) != v}
                    case Text() if self._texts.get(entry.file) == entry.text:
                        del self._texts[entry.file]
                    case File() | DataUsed():
                        self._others.remove(entry)
                    case End():
                        self._end = None

    def _keep(self, entries: list[Entry]) -> None:
        """Put entries into the outbox. What has no room there is kept for the next time, and is lost at the end."""
        if not entries:
            return
        try:
            if self._outbox is not None:
                self._outbox.append(self._run_id, entries)
        except StorageError as error:
            self.problem = str(error)
            if not self._closing:
                return
            self.lost += count(entries)
        if self._outbox is None:
            self.lost += count(entries)
        self._done(entries)

    def _refused(self, entry: Entry, why: str) -> None:
        self.problem = why
        if self._outbox is None:
            self.lost += count([entry])
            return
        try:
            path = self._outbox.reject(self._run_id, [entry], why)
            self.problem = f"{why}; kept in {path}"
        except StorageError as error:
            self.problem = str(error)
            self.lost += count([entry])


def send(store: RunStore, run_id: str, entry: Entry) -> None:
    """Write one entry to the store.

    Raises:
        Unavailable: the store does not answer; the entry may have been written.
        StorageError: it is refused for good.
    """
    match entry:
        case Write():
            store.write(run_id, entry.points, entry.tags)
        case Text():
            store.log_text(run_id, entry.text, entry.file)
        case File():
            path = Path(entry.path)
            if path.is_file():  # otherwise it was deleted in the meantime
                store.log_artifact(run_id, path, entry.folder)
        case DataUsed():
            store.log_data(run_id, entry)
        case Model():
            if Path(entry.path).is_dir():
                store.keep_model(run_id, entry)
        case End():
            store.end_run(run_id, entry.status, entry.tags, entry.description, entry.end_ms)
        case _:
            raise AssertionError(f"{entry} is for the delivery alone")
