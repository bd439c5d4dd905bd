"""What optuna-dashboard and MLflow say of a trial follows what the log says, and leaves alone what people wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import optuna
import pytest
from optuna_dashboard import get_note, save_note

from search import records
from search.dashboards import notes
from search.diagnosis import Advice, Finding
from search.records import Outcome
from search.report.retold import Retold
from search.storage.database import close_storage, open_storage
from search.tracking import judgement
from search.tracking.mlflow_private import NOTE
from tests.support import candidate_trials
from trainer.config import TrainConfig

LOSSES = {"last_epoch": 6, "val_first": 0.5, "val_last": 0.4, "train_first": 0.5, "train_last": 0.4}
SLOW = Finding(id="too_slow", kind="val", severity="info", evidence={**LOSSES, "per_epoch": 0.02}, cause="straight")
FALLS = replace(SLOW, cause=None, advice=(Advice(action="raise", parameter="num_epochs", before=6, after=12),))
ENDED = Outcome(state="COMPLETE", reason=records.FINISHED, detail="6 epochs done")
SAID = judgement.description("COMPLETE", records.FINISHED, ENDED.detail, (SLOW,))


@pytest.fixture
def study(tmp_path: Path) -> Iterator[optuna.Study]:
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    study = optuna.create_study(study_name="demo", storage=storage)
    for value in (0.4, 0.41):
        trial = study.ask()
        notes.annotate_trial(
            trial,
            folder=tmp_path,
            outcome=ENDED,
            findings=(SLOW,),
            epochs=(),
            config=TrainConfig().model_dump(mode="json"),
            run=None,
        )
        study.tell(trial, value)
    yield study
    close_storage(storage)


def told(number: int, finding: Finding, tags: dict[str, str]) -> records.TrialRecord:
    trial = candidate_trials.trial(number, 0.4, attrs={records.FINDINGS: [finding.to_dict()]})
    return replace(trial, run_id=f"run-{number}", tags=tags, reason=ENDED.reason, detail=ENDED.detail)


def note(study: optuna.Study, number: int) -> str:
    trial: Any = MagicMock(storage=study._storage, study=study, _trial_id=study.trials[number]._trial_id)
    return get_note(trial)


def test_note_and_run_are_told_what_the_log_says(study: optuna.Study) -> None:
    book, before = MagicMock(), [note(study, 0), note(study, 1)]
    tags = {**judgement.tags((SLOW,)), NOTE: SAID, "state": "COMPLETE"}
    retold = Retold(study, book)
    trials = [told(0, FALLS, tags), told(1, SLOW, tags)]
    for _ in range(2):  # the second time there is nothing new
        retold(trials)
    assert "**too slow** (`too_slow`)" in before[0] and "too slow" not in note(study, 0)
    assert "- **still falling** (`still_falling`): " in note(study, 0)
    assert note(study, 0).split("\n\n")[0] == before[0].split("\n\n")[0]
    assert note(study, 0).split("\n\n")[3:] == before[0].split("\n\n")[3:]
    assert note(study, 1) == before[1]
    ((run_id, points, written),) = [call.args for call in book.add.call_args_list]
    assert (run_id, points) == ("run-0", ())
    description = written.pop(NOTE)
    assert "`still_falling`" in description and "too_slow" not in description
    assert written == {
        "finding": "still_falling",
        "findings": "still_falling",
        "finding.still_falling": "true",
        "finding.too_slow": "false",
    }


def test_what_people_wrote_is_kept(study: optuna.Study) -> None:
    trial: Any = MagicMock(storage=study._storage, study=study, _trial_id=study.trials[0]._trial_id)
    save_note(trial, "Looks good.\n\nDecide later.\n\n" + note(study, 0))
    theirs, book = note(study, 0), MagicMock()
    Retold(study, book)(
        [told(0, FALLS, {**judgement.tags((SLOW,)), "state": "COMPLETE", NOTE: f"{SAID}\nRun it again?"})]
    )
    assert note(study, 0) == theirs
    assert NOTE not in book.add.call_args.args[2] and book.add.call_args.args[2]["finding"] == "still_falling"


def test_it_goes_on_where_mlflow_is_away_and_says_nothing_twice(study: optuna.Study) -> None:
    book = MagicMock()
    retold = Retold(study, book)
    retold([told(0, FALLS, {})])
    retold([told(0, replace(FALLS, evidence={**FALLS.evidence, "per_epoch": 0.03}), {})])  # called the same
    assert [call.args[2]["findings"] for call in book.add.call_args_list] == ["still_falling"]
    retold([told(0, SLOW, {})])  # and back
    assert [call.args[2]["findings"] for call in book.add.call_args_list][1:] == ["too_slow"]
    assert "`too_slow`" in note(study, 0)


def test_a_trial_that_ends_between_the_two_readings_is_told_the_next_time(study: optuna.Study) -> None:
    book, before = MagicMock(), note(study, 0)
    retold = Retold(study, book)
    retold([told(0, FALLS, {"study": "demo"})])  # MLflow was read before its end, Optuna after it
    assert not book.add.called and note(study, 0) == before
    retold([told(0, FALLS, {**judgement.tags((SLOW,)), "state": "COMPLETE"})])
    assert book.add.called and note(study, 0) != before
