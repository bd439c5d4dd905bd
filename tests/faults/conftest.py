"""Searches in the background that no test leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.support.search_process import Search


@pytest.fixture
def start() -> Iterator[Callable[[list[str]], Search]]:
    """Starts a search as users do; at the end all that is left of it is killed, its stopped workers too."""
    started: list[Search] = []

    def begin(arguments: list[str]) -> Search:
        started.append(Search(arguments, fresh=True))
        return started[-1]

    yield begin
    for search in started:
        search.kill()
        for process in psutil.process_iter():
            try:
                # The search leads a session of its own, which its workers are in.
                if process.pid != search.process.pid and _session(process.pid) == search.process.pid:
                    process.kill()
            except (psutil.Error, ProcessLookupError):
                continue


def _session(pid: int) -> int:
    import os

    return os.getsid(pid)
