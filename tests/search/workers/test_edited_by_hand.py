"""Rows that other programs delete or change in Optuna's database: the study goes on, each trial with its own files."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from search import leaderboard, records
from search.reading import read_study
from search.records import TrialRecord
from search.report.write import refresh
from search.storage import lifecycle
from search.storage.database import close_storage, open_storage
from search.tracking.client import open_tracking
from search.workers.protocol import Notice, TrialEnded
from search.workers.trial import TrialRun
from tests.search.workers.conftest import Search, is_epoch
from trainer.events import EpochEnded

DATABASE = "runs/optuna.db"
CHILDREN = ("params", "values", "intermediate_values", "user_attributes", "system_attributes", "heartbeats")


def execute(file: Path, *statements: str) -> None:
    """Change rows as another program does."""
    with closing(sqlite3.connect(file)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def delete(file: Path, number: int) -> None:
    """Delete a trial's rows."""
    which = f"trial_id = (select trial_id from trials where number = {number})"
    execute(
        file, *(f"delete from trial_{each} where {which}" for each in CHILDREN), f"delete from trials where {which}"
    )


def check_files(trials: tuple[TrialRecord, ...], study: Path) -> None:
    """Each trial has a folder of its own, with the checkpoint of its own configuration, of this study."""
    owners = set()
    assert len({t.attrs[records.FOLDER] for t in trials}) == len(trials)
    for trial in trials:
        adapter = leaderboard.adapter(study, trial)
        state = json.loads((adapter.parent / "state.json").read_text())
        owners.add(state["owner"])
        made_by = state["config"]
        assert (made_by["learning_rate"], made_by["lora_r"]) == (trial.config["learning_rate"], trial.config["lora_r"])
        assert json.loads((study / trial.attrs[records.FOLDER] / "config.json").read_text()) == trial.config
    assert len(owners) == 1 and len(owners.pop()) == 32


def names_in_mlflow(runs: Path) -> list[str]:
    """What its runs of trials are called, without their params."""
    tracking = open_tracking(f"sqlite:///{runs / 'mlflow.db'}", runs / "artifacts")
    experiment = tracking.find_experiment("work")
    assert experiment is not None
    names = (run.tags["mlflow.runName"] for run in tracking.runs(experiment).values())
    return sorted(name.partition(" lr=")[0] for name in names if name.startswith("trial "))


@pytest.mark.parametrize(
    ("deleted", "number", "folder", "name"),
    [(0, 3, "trials/0003", "trial 003"), (2, 2, "trials/0002-2", "trial 002-2")],
    ids=["the first", "the last"],
)
def test_a_deleted_trials_folder_is_no_other_trials(
    search: Search, tmp_path: Path, deleted: int, number: int, folder: str, name: str
) -> None:
    """Optuna counts rows: it would give number 2 again while it is there, and its cache would show one of both."""
    search(trials=3, slots=1, num_epochs=1)
    delete(tmp_path / DATABASE, deleted)
    trials, heard = search(trials=3, slots=1, num_epochs=1)
    assert not [m.text for m in heard if isinstance(m, Notice)]
    assert [t.number for t in trials] == sorted({0, 1, 2, number} - {deleted} | {number})
    assert {t.state for t in trials} == {"COMPLETE"} and sum(map(is_epoch, heard)) == 1, "it adopts no checkpoint"
    assert trials[-1].attrs[records.FOLDER] == folder
    check_files(trials, tmp_path / "runs" / "work")
    assert names_in_mlflow(tmp_path / "runs") == sorted({"trial 000", "trial 001", "trial 002", name})


@pytest.mark.long
@pytest.mark.parametrize("named", [True, False], ids=["queued by this version", "queued by an earlier one"])
def test_a_trial_that_is_taken_up_goes_on_in_its_own_folder(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Its number is another's too, whose folder it must not have."""
    search(trials=3, slots=1, num_epochs=2)
    delete(tmp_path / DATABASE, 2)
    original = TrialRun.take

    def die(self: TrialRun, event: Any) -> Any:
        found = original(self, event)
        if self.trial.number == 2 and isinstance(event, EpochEnded) and event.epoch == 1:
            lifecycle.requeue_lost(self.study, is_alive=lambda worker: False)
        return found

    monkeypatch.setattr(TrialRun, "take", die)
    if not named:
        kept = tuple(key for key in lifecycle._CARRIED_OVER if key != records.FOLDER)
        monkeypatch.setattr(lifecycle, "_CARRIED_OVER", kept)
    trials, heard = search(trials=3, slots=1, num_epochs=2)
    assert [(t.number, t.state) for t in trials[2:]] == [(2, "FAIL"), (3, "COMPLETE")]
    assert {t.attrs[records.FOLDER] for t in trials[2:]} == {"trials/0002-2"}
    check_files((*trials[:2], trials[3]), tmp_path / "runs" / "work")
    assert len(trials[3].attrs[records.TRAIN_LOSSES]) == 2 and sum(map(is_epoch, heard)) == 3, "one of them again"


PARAM = "update trial_params set {} where trial_id = {{0}}"
ELSEWHERE = (
    """distribution_json = '{{{{"name": "CategoricalDistribution", "attributes": {{{{"choices": ["a", "b"]}}}}}}}}'"""
)
EDITS = {
    "a value of 0": "update trial_values set value = 0.0 where trial_id = {0}",
    "a text as value": "update trial_values set value = 'low' where trial_id = {0}",
    "no value": "delete from trial_values where trial_id = {0}",
    "another rate": PARAM.format("param_value = 0.002") + " and param_name = 'learning_rate'",
    "a rate outside of the space": PARAM.format("param_value = 7") + " and param_name = 'learning_rate'",
    "a text as param": PARAM.format("param_value = 'eight'") + " and param_name = 'lora_r'",
    "a text of another distribution": PARAM.format(f"param_value = 1, {ELSEWHERE}"),
    "no point of another distribution": PARAM.format(f"param_value = 9, {ELSEWHERE}"),
    "no distribution": PARAM.format("distribution_json = '{{{{'"),
    "a damaged attribute": "update trial_user_attributes set value_json = '{{' where trial_id = {0}",
    "a text as loss": "update trial_intermediate_values set intermediate_value = 'low' where trial_id = {0}",
}


@pytest.mark.long
def test_what_is_changed_in_trials_that_have_ended_ends_no_search(search: Search, tmp_path: Path) -> None:
    before, _ = search(trials=len(EDITS), slots=1, num_epochs=1)
    execute(tmp_path / DATABASE, *(edit.format(key) for key, edit in enumerate(EDITS.values(), start=1)))
    trials, _ = search(trials=len(EDITS) + 1, slots=1, num_epochs=1)
    assert {t.state for t in trials} == {"COMPLETE"}
    for (what, _), old, new in zip(EDITS.items(), before, trials, strict=False):
        assert new.value == old.value, f"{what}: it is as its epoch measured it"
    best = leaderboard.best(trials)
    assert best is not None and best.value is not None and best.value == min(t.value or 9e9 for t in trials) > 0.001
    assert leaderboard.as_text(trials) and leaderboard.summary(trials)
    storage = open_storage(f"sqlite:///{tmp_path / DATABASE}")
    try:
        study = optuna.load_study(study_name="work", storage=storage)
        assert refresh(read_study(study), tmp_path / "log")
    finally:
        close_storage(storage)


def test_a_trial_that_is_told_by_hand_while_it_trains_is_let_go(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dashboard, where a RUNNING trial takes a value. No epoch measured it: it is not the study's best."""
    original = TrialRun.take

    def told(self: TrialRun, event: Any) -> Any:
        if self.trial.number == 0 and isinstance(event, EpochEnded) and event.epoch == 2:
            self.study.tell(0, 0.001, state=TrialState.COMPLETE)
        return original(self, event)

    monkeypatch.setattr(TrialRun, "take", told)
    trials, heard = search(trials=2, slots=1)
    assert [t.state for t in trials] == ["COMPLETE", "COMPLETE"]
    assert [m.text for m in heard if isinstance(m, Notice)] == [
        "trial 0 was taken over by another process, and is left to it"
    ]
    assert [m.number for m in heard if isinstance(m, TrialEnded)] == [0, 1]
    assert trials[0].best_epoch is None and trials[0].value != 0.001, "what its first epoch measured"
    best = leaderboard.best(trials)
    assert best is not None and best.number == 1
