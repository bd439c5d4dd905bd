"""`Writer`: writes points and tags of one run to a store from a thread of its own, and loses nothing silently."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, Protocol

from search.errors import StorageError

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Unavailable(StorageError):
    """The store does not answer now; the same call may succeed later."""


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    step: int
    time_ms: int
    """Milliseconds since the epoch (UTC)."""


class RunStore(Protocol):
    """Where runs are written. Every method may raise `Unavailable` (try again) or `StorageError` (don't).

    Writing the same point twice must leave one: a write that failed may have succeeded, and is done again.
    """

    def write(self, run_id: str, points: Iterable[Point], tags: Mapping[str, str]) -> None: ...
    def log_text(self, run_id: str, text: str, file: str) -> None: ...
    def end_run(self, run_id: str, status: Status, tags: Mapping[str, str], description: str) -> None: ...


class Writer(threading.Thread):
    """Writes what is put to it, in order, from a thread of its own.

    `put` never waits: memory is bounded by the points a run may have (`EXACT_POINTS` and so on), even if the store
    is away for the whole run. A failed write is tried again with growing pauses; one that can never succeed is kept
    as an error, and what it would have written is counted as lost. `close` tells.
    """

    def __init__(self, store: RunStore, run_id: str, flush_s: float) -> None:
        super().__init__(name=f"tracking-{run_id[:8]}", daemon=True)
        self._store, self._run_id, self._flush_s = store, run_id, flush_s
        self._changed = threading.Condition()
        self._points: list[Point] = []
        self._tags: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._due = False
        self._deadline: float | None = None
        self.problem: str | None = None
        """Why the latest write failed or something was lost, None while all is well."""
        self.lost = 0
        self.cpu_s = 0.0
        """Processor time spent writing: what recording takes from a training that shares the processor."""

    def put(
        self,
        points: Iterable[Point] = (),
        tags: Mapping[str, str] | None = None,
        texts: Mapping[str, str] | None = None,
        *,
        now: bool = False,
    ) -> None:
        """Queue; written within `flush_s` seconds, or `now`."""
        with self._changed:
            self._points.extend(points)
            self._tags.update(tags or {})
            self._texts.update(texts or {})
            if now and not self._due:
                self._due = True
                self._changed.notify()

    def close(self, timeout_s: float) -> int:
        """Write what is queued and end. Returns the number of things that could not be written.

        Tries for `timeout_s` seconds where the store does not answer.
        """
        with self._changed:
            self._deadline = time.monotonic() + timeout_s
            self._changed.notify()
        self.join()
        return self.lost + len(self._points) + len(self._tags) + len(self._texts)

    def run(self) -> None:
        """The thread's work."""
        failures = 0
        while True:
            with self._changed:
                if failures:
                    self._changed.wait_for(lambda: self._deadline is not None, min(30.0, 0.2 * 2**failures))
                else:
                    self._changed.wait_for(lambda: self._deadline is not None or self._due, self._flush_s)
                self._due = False
                deadline = self._deadline
            failures = 0 if self._drain() else failures + 1
            if deadline is not None:
                left = deadline - time.monotonic()
                if not failures or left <= 0:
                    return
                time.sleep(min(left, 0.2 * 2 ** min(failures, 5)))

    def _drain(self) -> bool:
        """Write all that is queued. False if the store did not answer: what is queued stays queued."""
        with self._changed:
            points, tags, texts = list(self._points), dict(self._tags), dict(self._texts)
        if not (points or tags or texts):
            return True
        began = time.thread_time()
        try:
            if points or tags:
                self._store.write(self._run_id, points, tags)
            for file, text in texts.items():
                self._store.log_text(self._run_id, text, file)
            self.problem = self.problem if self.lost else None  # what was lost for good stays told
        except Unavailable as error:
            self.problem = str(error)
            return False
        except Exception as error:  # noqa: BLE001 - not swallowed: counted as lost here, raised by the recorder's finish
            self.problem = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
            self.lost += len(points) + len(tags) + len(texts)
        finally:
            self.cpu_s += time.thread_time() - began
        with self._changed:
            del self._points[: len(points)]
            self._tags = {k: v for k, v in self._tags.items() if tags.get(k) != v}
            self._texts = {k: v for k, v in self._texts.items() if texts.get(k) != v}
        return True
