"""Keeps the tuning log up to date while a study runs, in a thread of the supervisor."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna

    from search.tracking.runs import StudyRuns

log = logging.getLogger("search.report.keeper")

PAUSE_S = 10.0
"""Trials ending within this many seconds share one update."""
SHARE = 0.02
"""Largest share of the time that writing may take: the cores belong to the workers. Drawing takes a second, so trials
of minutes are written about as they end, and trials of seconds about once a minute."""


class LogKeeper(threading.Thread):
    """Writes the tuning log, its plots, their copies in the study's MLflow run, and the study's note after trials.

    It only reads the records, so a failure here cannot damage them: it is logged, and the end of the next trial, or
    `python -m search.report`, writes the log again. While MLflow is away the log is written from what Optuna and the
    outbox have, and says so.
    """

    def __init__(self, study: optuna.Study, book: StudyRuns, folder: Path, options: tuple[str, ...]) -> None:
        super().__init__(name="tuning-log", daemon=True)
        self._study, self._book, self._folder, self._options = study, book, folder, options
        self._changed = threading.Condition()
        self._due = False
        self._closing = False

    def due(self) -> None:
        """Note that a trial has ended: the log is due."""
        with self._changed:
            self._due = True
            self._changed.notify()

    def close(self) -> list[Path]:
        """Write a last time and end the thread; returns the files, none if they could not be written."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.join()
        return self._try_to_write()

    def run(self) -> None:
        """Wait for trials to end, write, pause."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closing)
                if self._closing:
                    return
                self._due = False
            began = time.monotonic()
            self._try_to_write()
            with self._changed:
                pause = max(PAUSE_S, (time.monotonic() - began) / SHARE)
                self._changed.wait_for(lambda: self._closing, timeout=pause)

    def _try_to_write(self) -> list[Path]:
        try:
            return self._write()
        except Exception:  # the records are intact; the log can be written again from them
            log.exception("the tuning log could not be written")
            return []

    def _write(self) -> list[Path]:
        from search.dashboards import notes
        from search.errors import Unavailable
        from search.reading import read_study
        from search.report.write import refresh
        from search.tracking.pages import pages_of, runs_page

        try:
            record = read_study(self._study, self._book.connect(), self._book.outbox)
        except Unavailable as error:
            log.warning("the tuning log is written without MLflow: %s", error)
            record = read_study(self._study, None, self._book.outbox, away=True)
        written = refresh(record, self._folder, options=self._options)
        page = runs_page(pages_of(self._book.uri), record.experiment_id or "0")
        notes.annotate_study(self._study, record.trials, page, written[0])
        for path in written:
            self._book.keep(path, None if path.parent == self._folder else path.parent.name)
        return written
