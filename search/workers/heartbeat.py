"""Heartbeats of a worker's trials, from a thread: Optuna records them inside `optimize` only (optuna#3293)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from search.storage import lifecycle

if TYPE_CHECKING:
    import optuna

    from search.workers.trial import TrialRun

BEATS = 20
"""Heartbeats in the time after which a trial is lost (`Job.lost_after_s`)."""

log = logging.getLogger("search.workers.heartbeat")


@contextmanager
def beating(study: optuna.Study, lost_after_s: float, running: Callable[[], Iterable[TrialRun]]) -> Iterator[None]:
    """Record heartbeats of the running trials while this lasts, and note which of them another process took over."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(lost_after_s / BEATS):
            for run in running():
                try:
                    run.taken_over = not lifecycle.heartbeat(study, run.trial)
                except Exception:  # whatever the database's driver raises; the next beat may get through
                    log.exception("heartbeat of trial %d not recorded", run.trial.number)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
