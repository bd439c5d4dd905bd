"""Every epoch of every trial as a table beside the log, so that the log itself can be short and nothing is lost."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields

from search import records
from search.records import EpochRecord, finite
from search.report.epochs import EpochRow, epoch_rows
from search.report.facts import Facts


def table(facts: Facts) -> bytes:
    """CSV: a line for each epoch of each trial, repeats included; a cell is empty where nothing finite is recorded."""
    metrics = [field.name for field in fields(_kind(facts))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "repeat_of", *metrics, "mark", "best"])
    for e in facts.experiments:
        _write(writer, e.number, "", e.rows, metrics)
    for trial in facts.repeats:
        rows = epoch_rows(trial, (), facts.noise.deviation)
        _write(writer, trial.number, str(trial.attrs[records.REPEAT_OF]), rows, metrics)
    return out.getvalue().encode()


def _kind(facts: Facts) -> type[EpochRecord]:
    """The type of the epochs: one that has a further metric is a type of its own."""
    epochs = (epoch for trial in facts.record.trials for epoch in trial.epochs)
    return type(next(epochs, EpochRecord(epoch=1)))


def _write(writer, number: int, of: str, rows: Sequence[EpochRow], metrics: Sequence[str]) -> None:  # type: ignore[no-untyped-def]
    for row in rows:
        values = [getattr(row.record, name) for name in metrics]
        cells = ["" if not finite(value) else repr(value) for value in values]
        writer.writerow([number, of, *cells, row.mark, int(row.is_best)])
