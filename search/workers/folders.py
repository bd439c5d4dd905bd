"""Where a trial's files lie: in a folder that no other trial has, but those whose work it continues.

A folder is named by the number of the trial that first has it. Numbers come again once another program has deleted a
trial's row, keys of a database too, and the folder of the deleted trial is still there.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from search import records


def claim(study: optuna.Study, trial: optuna.Trial, below: Path) -> Path:
    """The trial's folder, made; its name is stored with the trial.

    Args:
        study: The study.
        trial: The trial, which runs.
        below: The study's folder.
    """
    known = trial.user_attrs.get(records.FOLDER)
    if known is not None:
        name = str(known)
    elif records.RESUMES in trial.user_attrs:  # without it, there is no need to read the trials
        name = _continued(study, trial, below)
    else:
        name = _new(below, trial.number)
    if known is None:
        trial.set_user_attr(records.FOLDER, name)
    folder = below / name
    folder.mkdir(parents=True, exist_ok=True)  # another host's runs folder does not have it
    return folder


def _continued(study: optuna.Study, trial: optuna.Trial, below: Path) -> str:
    """The folder of the work that the trial continues, of one that an earlier version queued without its name."""
    trials = {each.number: each for each in study.get_trials(deepcopy=False)}
    latest: FrozenTrial = trials[trial.number]
    while (before := latest.user_attrs.get(records.RESUMES)) is not None:
        if before not in trials:  # deleted since it was lost: its folder is the one of its number
            return records.folder_of(before)
        latest = trials[before]
        if records.FOLDER in latest.user_attrs:
            return str(latest.user_attrs[records.FOLDER])
    return _new(below, latest.number)  # nobody began it


def _new(below: Path, number: int) -> str:
    """The first folder of a number that nobody has made, made now."""
    for place in count(1):
        name = records.folder_of(number, place)
        try:
            (below / name).mkdir(parents=True)
        except FileExistsError:
            continue
        return name
    raise AssertionError
