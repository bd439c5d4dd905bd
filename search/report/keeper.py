"""Keeps the tuning log up to date while a study runs, in a thread of the supervisor."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import optuna

    from search.diagnosis.messages import Lang
    from search.records import StudyRecord, TrialRecord
    from search.report.retold import Retold
    from search.tracking.outbox import Point
    from search.tracking.runs import StudyRuns

log = logging.getLogger("search.report.keeper")

PAUSE_S = 10.0
"""Trials ending within this many seconds share one update; a study that is over by then has one, at its end."""
SHARE = 0.02
"""Largest share of the time that writing may take: the cores belong to the workers. Drawing takes a second, so trials
of minutes are written about as they end, and trials of seconds about once a minute."""


class LogKeeper(threading.Thread):
    """Writes the tuning log, its plots, its pages in the study's MLflow run, and the study's notes after trials.

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
        self._told: set[Point] = set()
        self._retold: Retold | None = None
        self.trials: tuple[TrialRecord, ...] = ()
        """As the log has last told them; none before."""

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
        """Wait for trials to end, for others that end just after them, write, pause."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closing)
                self._changed.wait_for(lambda: self._closing, timeout=PAUSE_S)
                if self._closing:
                    return
                self._due = False
            began = time.monotonic()
            self._try_to_write()
            with self._changed:
                pause = (time.monotonic() - began) / SHARE - PAUSE_S
                self._changed.wait_for(lambda: self._closing, timeout=max(pause, 0))

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
        from search.report.facts import gather
        from search.report.retold import Retold
        from search.report.write import write_all
        from search.tracking import views
        from search.tracking.pages import pages_of, runs_page

        try:
            record = read_study(self._study, self._book.connect(), self._book.outbox)
        except Unavailable as error:
            log.warning("the tuning log is written without MLflow: %s", error)
            record = read_study(self._study, None, self._book.outbox, away=True)
        facts = gather(record, options=self._options)
        self.trials = facts.trials
        written = write_all(facts, self._folder)
        pages = self._pages(written)
        server = pages_of(self._book.uri)
        place = record.experiment_id or "0"
        two = runs_page(server, place, views.BEST_TWO) if len(_leaders(record)) > 1 else None
        summary = notes.annotate_study(
            self._study, self.trials, facts.verdict, runs_page=runs_page(server, place), log=written[0], best_two=two
        )
        for path in pages:
            self._book.keep(path)
        self._tell(record, summary)
        self._retold = self._retold or Retold(self._study, self._book)
        self._retold(self.trials)
        return [*written, *pages]

    def _pages(self, written: Sequence[Path]) -> list[Path]:
        """The logs as pages that need no other file, beside them: MLflow shows a Markdown's pictures as text."""
        from search.report import page
        from search.report.write import replace

        images = {f"{p.parent.name}/{p.name}": p.read_bytes() for p in written if p.suffix != ".md"}
        made = []
        for log_file in (p for p in written if p.suffix == ".md"):
            lang: Lang = "zh" if log_file.name.endswith(".zh.md") else "en"
            path = log_file.with_suffix(".html")
            replace(path, page.html(log_file.read_text("utf-8"), lang, log_file.stem, images).encode())
            made.append(path)
        return made

    def _tell(self, record: StudyRecord, summary: str) -> None:
        """The study's MLflow run and experiment: the best loss by trial, the summary, the views of its runs."""
        from search.tracking import study_run, views
        from search.tracking.mlflow_private import NOTE
        from search.tracking.outbox import STUDY

        new = [point for point in study_run.points(record.trials) if point not in self._told]
        self._book.add(STUDY, new, {NOTE: summary})
        self._told.update(new)
        leaders = _leaders(record)
        shown = views.tags(cider=record.definition.get("objective") == "cider")
        self._book.describe({**shown, **(views.of_two(leaders) if len(leaders) > 1 else {})})


def _leaders(record: StudyRecord) -> list[str]:
    """MLflow's runs of the best two trials, fewer if there are no more that MLflow has."""
    from search.leaderboard import ranked, searched
    from search.tracking.outbox import is_local

    trials = [t for t in ranked(searched(record.trials)) if t.value is not None and not t.violated]
    return [t.run_id for t in trials if t.run_id is not None and not is_local(t.run_id)][:2]
