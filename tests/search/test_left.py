"""Runs of lost trials are ended in MLflow, whoever died before it could do so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search import records
from search.places import Places
from search.processes import NAMESPACE_TAG, STARTED_TAG
from search.session.left import nobody_writes
from search.tracking.runs import StudyRuns
from tests.support.candidate_trials import trial
from trainer.config import TrainConfig


@pytest.fixture
def runs(tmp_path: Path) -> StudyRuns:
    found = StudyRuns(Places.of(tmp_path), "demo")
    found.start_study({})
    return found


def begun(runs: StudyRuns, number: int, **tags: str) -> str:
    """A run whose process is of an earlier boot, so that nothing is known of it."""
    where = {"host": "node", "pid": "7", STARTED_TAG: "7@earlier:1", NAMESPACE_TAG: "7@1"}
    config = TrainConfig(model="m", data="d").model_dump()
    recorder = runs.begin("any", config, {"trial": str(number), **where, **tags})
    return recorder.run_id


def test_a_run_of_an_unknown_process_is_ended_once_its_trial_is_lost(runs: StudyRuns) -> None:
    of_lost, other, no_trial = begun(runs, 0), begun(runs, 1), begun(runs, 0, kind="retrained")
    runs.close_dangling(nobody_writes(lambda: [trial(0, None, "FAIL", reason=records.LOST)]))
    tracking = runs.connect()
    found = tracking.runs(tracking.experiment("demo"))
    assert (found[of_lost].status, found[of_lost].tags["reason"]) == ("KILLED", records.LOST)
    assert found[other].status == found[no_trial].status == "RUNNING"


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("FINISHED", {"state": "COMPLETE", "reason": records.FINISHED}),
        ("FAILED", {"state": "FAIL", "reason": records.ERROR}),
        ("KILLED", {"state": "WAITING", "reason": records.INTERRUPTED}),
    ],
)
def test_a_lost_trial_whose_run_ended_otherwise_is_lost_there_too(
    runs: StudyRuns, status: Any, told: dict[str, str]
) -> None:
    ended, gone = begun(runs, 0), "0" * 32
    runs.end(ended, status, told)
    lost = [trial(0, None, "FAIL", reason=records.LOST), trial(1, None, "FAIL", reason=records.LOST)]
    runs.settle([replace(each, run_id=run_id) for each, run_id in zip(lost, (ended, gone), strict=True)])
    assert told_of(runs)[ended] == ("KILLED", "FAIL", records.LOST)


def test_a_trial_whose_end_was_stored_though_nothing_answered_has_ended_in_mlflow_too(runs: StudyRuns) -> None:
    """Its worker, which cannot know, has said that it is interrupted. One that does wait is left as it is."""
    interrupted = {"state": "WAITING", "reason": records.INTERRUPTED}
    ended, waits = begun(runs, 0), begun(runs, 1)
    for run_id in (ended, waits):
        runs.end(run_id, "KILLED", interrupted)
    runs.settle(
        [trial(0, 0.5, "PRUNED", reason=records.RISING), trial(1, None, "WAITING", reason=records.INTERRUPTED)]
    )
    assert told_of(runs) == {
        ended: ("FINISHED", "PRUNED", records.RISING),
        waits: ("KILLED", "WAITING", records.INTERRUPTED),
    }


def told_of(runs: StudyRuns) -> dict[str, tuple[str, str | None, str | None]]:
    """(status, state, reason) of the trials' runs."""
    tracking = runs.connect()
    found = tracking.runs(tracking.experiment("demo"))
    return {
        run_id: (run.status, run.tags.get("state"), run.tags.get("reason"))
        for run_id, run in found.items()
        if run.tags.get("kind") == "trial"
    }
