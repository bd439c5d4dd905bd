"""Workers whose end can no longer be seen, since the process that they were forked from was killed."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil


class Orphans:
    """Processes that should end by themselves, each killed if it takes too long.

    They read the end of the pipe, set their trials back to waiting and end.
    """

    def __init__(self) -> None:
        self._processes: list[tuple[psutil.Process, float]] = []

    def add(self, pid: int | None, timeout_s: float) -> None:
        """Watch a process for `timeout_s` seconds."""
        self._processes.append((psutil.Process(pid), time.monotonic() + timeout_s))

    def kill_hung(self) -> None:
        """Kill those whose time is up, and forget those that have ended."""
        for process, until in list(self._processes):
            if not process.is_running() or time.monotonic() > until:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
                self._processes.remove((process, until))
