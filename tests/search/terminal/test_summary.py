"""The end of a search, as the terminal shows it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from search import records
from search.places import Places
from search.result import Result
from search.terminal.summary import sum_up
from search.verdict.race import Verdict
from tests.support.candidate_trials import trial


@pytest.mark.parametrize("named", [0, 1])
def test_what_the_verdict_names_is_what_is_to_be_taken(named: int, tmp_path: Path) -> None:
    """Its configuration and its adapter; the lowest loss is told beside it, if that is another's."""
    trials = tuple(trial(n, 0.4 + n / 1000, attrs={records.FOLDER: f"trials/{n:04d}"}) for n in range(3))
    result = Result(
        code=0,
        study_name="s",
        trials=trials,
        logs=(),
        folder=tmp_path,
        verdict=Verdict(kind="tied", choice=named, tied=(0, 1)),
        refused="Invalid model name",
    )
    out = io.StringIO()
    sum_up(Console(file=out, width=300), result, Places.of(tmp_path))
    said = out.getvalue()
    also = ", named by the verdict; the lowest is that of trial 0, 0.4000" if named else ""
    assert f"Best: trial {named}, validation loss 0.40{named}0 at epoch 4{also}\n" in said
    assert f'"learning_rate": 0.000{named + 1},' in said
    assert f"adapter  {tmp_path}/trials/000{named}/checkpoints/epoch-0004/adapter" in said
    assert "The winner's adapter is not among MLflow's models: Invalid model name\n" in said
