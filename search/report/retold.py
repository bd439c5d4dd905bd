"""Brings what optuna-dashboard and MLflow say of a trial up to what the tuning log says.

A worker judges a trial alone, at its end, and of one that was paused it knows the steps since it went on. The log
judges by all records and beside the other trials (`search.report.judged`), so its word may be another, then or later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from search import records
from search.dashboards import notes
from search.diagnosis import Finding
from search.diagnosis.messages import key
from search.tracking import judgement
from search.tracking.mlflow_private import NOTE

if TYPE_CHECKING:
    import optuna

    from search.records import TrialRecord
    from search.tracking.runs import StudyRuns

ENDED = ("COMPLETE", "PRUNED")


class Retold:
    """Tells again what has changed: a trial once after its end, and whenever it is called something else."""

    def __init__(self, study: optuna.Study, book: StudyRuns) -> None:
        self._study, self._book = study, book
        self._told: dict[int, tuple[str, ...]] = {}
        """What each trial was last called, by its findings' keys."""

    def __call__(self, trials: Sequence[TrialRecord]) -> None:
        """Write what differs.

        Args:
            trials: With the findings of the log, and the tags that MLflow has; a trial without tags (MLflow is away)
                gets new ones and keeps its description.
        """
        due: dict[int, tuple[TrialRecord, tuple[Finding, ...]]] = {}
        for trial in trials:
            found = tuple(Finding.from_dict(data) for data in trial.attrs.get(records.FINDINGS) or ())
            if trial.tags and trial.tags.get("state") != trial.state:
                continue  # it ended after MLflow was read and before Optuna was: what it is told of is not yet whole
            if trial.state in ENDED and found and self._told.get(trial.number) != _keys(found):
                due[trial.number] = (trial, found)
        if not due:
            return
        notes.retell(self._study, {number: found for number, (_, found) in due.items()})
        for number, (trial, found) in due.items():
            if trial.run_id is not None and (new := _new_tags(trial, found)):
                self._book.add(trial.run_id, (), new)
            self._told[number] = _keys(found)


def _new_tags(trial: TrialRecord, found: Sequence[Finding]) -> dict[str, str]:
    wanted = judgement.tags(found, trial.tags)
    said = trial.tags.get(NOTE)
    if said is not None and judgement.is_ours(said):
        wanted[NOTE] = judgement.description(trial.state, trial.reason, trial.detail, found)
    return {name: value for name, value in wanted.items() if trial.tags.get(name) != value}


def _keys(found: Sequence[Finding]) -> tuple[str, ...]:
    return tuple(key(finding) for finding in found)
