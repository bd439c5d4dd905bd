"""What the study's own MLflow run says, so that studies compare and sort in MLflow: its definition as params, its best
loss by trial as metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from search import leaderboard
from search.records import TrialRecord, finite, score_of
from search.space import in_words
from search.tracking.outbox import Point

BEST = "best_val_loss"
"""Metric of the study's run: its best validation loss so far, by the number of trials that have ended. As a trial's
metric of this name it is what MLflow sorts by."""
TRIAL = "trial_val_loss"
"""Metric of the study's run: the lowest validation loss of each trial, by the trial's number."""
TRIAL_CIDER, BEST_CIDER = "trial_cider_d", "best_cider_d"
"""The same of CIDEr-D, the highest, where the study ranks by it."""
ENDED = ("COMPLETE", "PRUNED", "FAIL")


def params(definition: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, str]:
    """The study's definition as params: of a searched field its range, of any other its value.

    Args:
        definition: `Study.definition()`.
        others: Further params, such as the strategy.
    """
    space = {name: in_words(stored) for name, stored in definition.get("space", {}).items()}
    base = {name: str(value) for name, value in definition.get("base", {}).items() if name not in space}
    return {**{name: str(value) for name, value in others.items()}, **base, **space}


def points(trials: Sequence[TrialRecord]) -> list[Point]:
    """`BEST` and `TRIAL` of all trials that have ended, and those of CIDEr-D where the study ranks by it; more trials
    only add points, unless clocks differ."""
    ended = [t for t in leaderboard.searched(trials) if t.state in ENDED and t.end_s is not None]
    found: list[Point] = []
    best: float | None = None
    top: float | None = None
    for count, trial in enumerate(sorted(ended, key=lambda t: (t.end_s, t.number)), start=1):
        time_ms = int((trial.end_s or 0.0) * 1000)
        if finite(trial.value) and not trial.violated:
            found.append(Point(TRIAL, trial.value, trial.number, time_ms))
        if leaderboard.best([trial]) is not None and finite(trial.value):
            best = trial.value if best is None else min(best, trial.value)
        if best is not None:
            found.append(Point(BEST, best, count, time_ms))
        score = score_of(trial.attrs)
        if score is not None:
            top = score if top is None else max(top, score)
            found.append(Point(TRIAL_CIDER, score, trial.number, time_ms))
        if top is not None:
            found.append(Point(BEST_CIDER, top, count, time_ms))
    return found
