"""A progress bar on a terminal's standard error; silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHOWN_FROM = 200
"""Least number of steps of which a bar is worth the line."""
EVERY = 20
"""Steps between two updates."""


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function that shows (steps done, all of them); the bar vanishes on leaving."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(what, total=None, visible=False)

    def show(done: int, total: int) -> None:
        if total >= SHOWN_FROM and (done % EVERY == 0 or done == total):
            progress.update(task, completed=done, total=total, visible=True)

    with progress:
        yield show
