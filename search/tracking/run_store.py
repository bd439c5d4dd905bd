"""What a store of runs offers to those who write to it, and the values they write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, Protocol

Status = Literal["FINISHED", "FAILED", "KILLED"]


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
    def end_run(
        self, run_id: str, status: Status, tags: Mapping[str, str], description: str, end_ms: int | None = None
    ) -> None: ...
