"""`--list`: the studies that are defined, and beside each what a database has of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import optuna

from search import leaderboard
from search.places import Places
from search.records import TrialRecord, score_of
from search.storage import lifecycle, studies
from search.storage.database import close_storage, open_existing
from search.verdict import text
from search.verdict.leaders import verdict_of, winner

if TYPE_CHECKING:
    from search.study import Study


def show(definitions: Iterable[Study], places: Places, *, as_json: bool = False) -> None:
    """Print the definitions with the studies of each, the latest generation last; then studies of other files.

    Args:
        definitions: The studies of this project.
        places: Where Optuna's database is; nothing is created.
        as_json: Print one JSON object instead of text.

    Raises:
        StorageError: the database cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = _stored(places)
    known = {study.name: study.description for study in definitions}
    if as_json:
        print(json.dumps({"definitions": known, "studies": found}, ensure_ascii=False, indent=2))
        return
    width = max(map(len, [*known, *(state["definition"] for state in found)]))
    for name, description in known.items():
        print(f"{name:<{width}}  {description}")
        for state in found:
            if state["definition"] == name:
                print(f"{'':<{width}}    {as_line(state)}")
    for state in found:
        if state["definition"] not in known:
            print(f"{state['definition']:<{width}}  {as_line(state)}")


def _stored(places: Places) -> list[dict[str, Any]]:
    storage = open_existing(places.storage_url, to_come=places.runs_dir)
    if storage is None:
        return []
    try:
        ours = [found.study_name for found in storage.get_all_studies() if studies.NAME in found.user_attrs]
        return [state_of_study(optuna.load_study(study_name=name, storage=storage)) for name in sorted(ours)]
    finally:
        close_storage(storage)


def state_of_study(study: optuna.Study) -> dict[str, Any]:
    """What a study has come to, as plain data."""
    trials = lifecycle.read_trials(study)
    verdict = verdict_of(trials, study.user_attrs)
    named = winner(trials, verdict)
    return {
        "name": study.study_name,
        "definition": study.user_attrs.get(studies.NAME, study.study_name),
        "counted": lifecycle.counted(study),
        "states": _states(trials),
        "best_trial": None if named is None else named.number,
        "best_val_loss": None if named is None else named.value,
        "best_cider_d": None if named is None else score_of(named.attrs),
        "verdict": None if verdict is None else verdict.kind,
        "sentence": None if verdict is None else text.sentence(verdict),
    }


def _states(trials: Iterable[TrialRecord]) -> dict[str, int]:
    found: dict[str, int] = {}
    for trial in leaderboard.searched(tuple(trials)):
        found[trial.state.lower()] = found.get(trial.state.lower(), 0) + 1
    return dict(sorted(found.items()))


def as_line(state: dict[str, Any]) -> str:
    """`rsicap: 12 trials (9 complete, 3 pruned), best 0.3742 (trial 3), verdict: tied`."""
    states = ", ".join(f"{count} {name}" for name, count in state["states"].items())
    best = "no loss yet"
    if state["best_trial"] is not None:
        best = f"best {state['best_val_loss']:.4f} (trial {state['best_trial']})"
        if state["best_cider_d"] is not None:
            best = f"best CIDEr-D {state['best_cider_d']:.4f} (trial {state['best_trial']})"
    verdict = f", verdict: {state['verdict']}" if state["verdict"] else ""
    trials = f"{state['counted']} trials ({states})" if states else "no trials yet"
    return f"{state['name']}: {trials}, {best}{verdict}"
