"""`trainer.run --from-study`: the winner again, on all rows; recorded under the study, compared with none of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from search.errors import StudyError
from search.options import opened
from search.places import Places
from search.reading import read_study
from search.retrain import _Recorder, configuration
from search.storage import lifecycle
from search.study import Study
from search.tracking.runs import StudyRuns
from tests.support import called, made_up_events, small_study
from tests.support import candidate_trials as leaders
from trainer import run as trainer_run
from trainer.config import TrainConfig, without_later
from trainer.data import dataset

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call() -> Call:
    def call(*arguments: object) -> tuple[int, str, str]:
        done = called.call(trainer_run.app, [*map(str, arguments)])
        return done.code, done.out, done.err

    return call


def test_the_winner_on_all_rows_is_recorded_under_the_study(
    call: Call,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = small_study.build(tmp_path_factory, tiny_checkpoint)
    runs = Path(shutil.copytree(small.runs, tmp_path / "runs"))
    study = ("--from-study", small_study.NAME, "--runs-dir", runs)
    with opened(small_study.NAME, Places.of(runs)) as (found, _):
        trial = lifecycle.read_trials(found)[small_study.GOOD]
    config = configuration(trial, ["max_samples=20"], full_data=True)
    assert (config.num_epochs, config.full_data) == (trial.best_epoch, True)
    # Trained, and a second call has nothing left to do.
    options = ("--trial", small_study.GOOD, "--full-data", "--set", "max_samples=20", "--set", "num_epochs=1")
    code, out, err = call(*study, *options)
    assert (code, err) == (0, "")
    assert "20 training and" in out
    folder = runs / small_study.NAME / "retrained" / f"trial-{small_study.GOOD:04d}-full"
    assert f"Trained on all rows: the adapter of the last epoch is in {folder}" in out
    assert "(from the checkpoint)" in call(*study, *options)[1]
    # Wrong input leaves that run as it is, and begins none.
    touched: list[Any] = []
    for name in ("begin", "resume"):
        monkeypatch.setattr(StudyRuns, name, lambda *arguments: touched.append(arguments) or MagicMock())
    code, _, err = call(*study, *options, "--set", "learning_rate=1e-3")
    assert code == 2 and "belongs to another configuration" in err
    code, _, err = call(*study, *options, "--set", "target_modules=foo", "--out", tmp_path / "new")
    assert code == 2 and "foo" in err and not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    code, _, err = call(*study, *options, "--out", tmp_path / "file")
    assert code == 2 and "cannot be made" in err
    assert not touched
    monkeypatch.undo()
    # In MLflow: a run of its own kind.
    with opened(small_study.NAME, Places.of(runs)) as (found, tracking):
        experiment = tracking.find_experiment(small_study.NAME)
        assert experiment is not None
        (made,) = [run for run in tracking.runs(experiment).values() if run.tags["kind"] == "retrained"]
        assert (made.status, made.tags["from_trial"], len(made.epochs)) == ("FINISHED", str(small_study.GOOD), 1)
        assert len(read_study(found, tracking).trials) == 5


def test_nothing_is_recorded_before_training_begins() -> None:
    """What fails between a checkpoint's history and the first step, a base that finds no room, is no run's end."""
    runs: list[list[Any]] = []

    def begin() -> Any:
        runs.append([])
        return MagicMock(side_effect=runs[-1].append)

    events = [made_up_events.epoch(1, 0.5), made_up_events.started(10), made_up_events.epoch(2, 0.4)]
    recorder = _Recorder(begin)
    recorder(events[0])
    recorder.finish("FAILED", state="FAIL")
    assert runs == []
    for event in events[1:]:
        recorder(event)
    assert runs == [events]


def test_a_trial_that_has_not_begun_has_nothing_to_train() -> None:
    """It was trained with the default configuration, as if that were the trial's."""
    waiting = replace(leaders.trial(3, None, "WAITING"), config={})
    with pytest.raises(StudyError, match="trial 3 is WAITING and has no configuration"):
        configuration(waiting, [], full_data=True)


def test_full_data_trains_on_the_validation_rows_too() -> None:
    examined = dataset.examine("mini")
    plain = dataset.split(examined, TrainConfig.parse({"max_samples": 40}))
    full = dataset.split(examined, TrainConfig.parse({"max_samples": 40, "full_data": True}))
    assert set(full.train) == {*plain.train, *plain.val}
    assert full.val == plain.val
    assert "full_data" not in without_later(TrainConfig().model_dump())


def test_a_study_may_not_learn_what_it_is_judged_by() -> None:
    with pytest.raises(StudyError, match="full_data trains on the rows that trials are judged by"):
        Study(name="x", description="", space={}, base={"full_data": True}, n_trials=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--full-data"], "belong to a study; name it with --from-study"),
        (["--from-study", "x", "--runs-dir", "nowhere"], "there is no database"),
    ],
)
def test_wrong_input_is_one_message(call: Call, arguments: list[str], message: str) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err
