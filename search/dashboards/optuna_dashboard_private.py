"""Notes of many trials at once. optuna-dashboard's `get_note` reads all notes of the study for each one that it gives,
and wants an `optuna.Trial`, which a trial that has ended is not; so these are its own functions beneath it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna_dashboard._note import get_note_from_system_attrs, save_note_with_version

from search.storage import optuna_private


@dataclass(frozen=True)
class Note:
    """A trial's note, as it was read."""

    body: str
    save: Callable[[str], None]
    """Replaces it."""


def read_notes(study: optuna.Study, numbers: Iterable[int]) -> dict[int, Note]:
    """The notes of trials, by number."""
    attrs: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in optuna_private.study_system_attrs(study).items():
        if name.startswith("dashboard:"):
            attrs[name.split(":")[1]][name] = value
    wanted, notes = set(numbers), {}
    storage, study_id = optuna_private.key_of(study)
    for trial in study.get_trials(deepcopy=False):
        if trial.number not in wanted:
            continue
        trial_id = optuna_private.trial_id(trial)
        held = get_note_from_system_attrs(attrs[str(trial_id)], trial_id)

        def save(body: str, trial_id: int = trial_id, version: int = held["version"]) -> None:
            save_note_with_version(storage, study_id, trial_id, version + 1, body)

        notes[trial.number] = Note(held["body"], save)
    return notes
