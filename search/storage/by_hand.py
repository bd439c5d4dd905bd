"""Values of trials that were changed by hand in the database: what the trial's epochs measured counts."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from optuna.trial import FrozenTrial, TrialState

from search import records

_NUMBER = (int, float)
"""SQLite stores a text in a column of numbers, too."""


def undo(trial: FrozenTrial) -> None:
    """Give a COMPLETE trial the value that it was told with, should it have another now.

    One that this program never began keeps what it was added with. Without a value at all it is read as a FAIL:
    samplers would end by an error.
    """
    trial.intermediate_values = {e: loss for e, loss in trial.intermediate_values.items() if isinstance(loss, _NUMBER)}
    if trial.state != TrialState.COMPLETE:
        return
    measured = _measured(trial)
    if measured is not None and trial.values != [measured]:
        trial.values = [measured]
    elif not trial.values or not _is_number(trial.values[0]):
        trial.values = None
        trial.state = TrialState.FAIL


def _measured(trial: FrozenTrial) -> float | None:
    """The value of a trial of this program's by what else is recorded of it, see `search.workers.trial`."""
    if records.FOLDER not in trial.user_attrs:
        return None
    score = trial.user_attrs.get(records.CIDER)
    if _is_number(score):
        return -float(score)
    lowest = records.lowest(trial.intermediate_values)
    return None if lowest is None else lowest[0]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, _NUMBER) and not math.isnan(value)
