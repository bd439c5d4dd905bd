"""Reading a study back from Optuna and MLflow, and the report's command line over both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from typer.testing import CliRunner

from search import records
from search import study_file as studies
from search.errors import StorageError, StudyError
from search.reading import read_study
from search.records import EpochRecord, StepRecord
from search.report import write
from search.report.__main__ import app
from search.storage import studies as storage
from search.storage.database import close_storage, open_storage
from search.tracking.client import open_tracking
from search.tracking.pages import server_url
from search.tracking.reader import RunCurves
from tests.support.report_data import config, falling

DISTRIBUTIONS = {
    "learning_rate": FloatDistribution(5e-6, 1e-3, log=True),
    "lora_r": IntDistribution(4, 32, log=True),
    "lora_alpha_per_lora_r": CategoricalDistribution((1, 2, 4)),
    "lora_dropout": FloatDistribution(0.0, 0.2),
    "batch_size": IntDistribution(2, 16, log=True),
    "warmup_steps": IntDistribution(0, 200),
}


def finished(number: int, run_id: str | None, losses: list[tuple[float, float]]) -> optuna.trial.FrozenTrial:
    values = {"learning_rate": 2e-4, "lora_r": 8, "lora_dropout": 0.1, "batch_size": 4, "warmup_steps": 10}
    attrs = {
        records.CONFIG: config(**values, lora_alpha=16, num_epochs=len(losses)),
        records.REASON: records.FINISHED,
        records.BEST_EPOCH: len(losses),
        records.TRAIN_LOSSES: [train for train, _ in losses],
        records.LABEL: f"number {number}",
    }
    return create_trial(
        state=TrialState.COMPLETE,
        value=min(val for _, val in losses),
        params={**values, "lora_alpha_per_lora_r": 2},
        distributions=DISTRIBUTIONS,
        user_attrs=attrs | ({records.RUN_ID: run_id} if run_id else {}),
        intermediate_values={epoch: val for epoch, (_, val) in enumerate(losses, start=1)},
    )


@pytest.fixture
def study(tmp_path: Path) -> Iterator[optuna.Study]:
    """The rsicap study in a database of its own, without trials."""
    database = open_storage(f"sqlite:///{tmp_path / 'optuna.db'}")
    yield storage.open_study(database, replace(studies.load("rsicap"), enqueue=()))
    close_storage(database)


class FakeTracking:
    """What `read_study` asks of a Tracking."""

    uri = "http://user:secret@mlflow.example:5000/base/"

    def __init__(self, runs: dict[str, RunCurves]) -> None:
        self._runs = runs

    def find_experiment(self, name: str) -> str | None:
        return "7"

    def find_parent(self, name: str) -> str | None:
        return "parent"

    def runs(self, experiment_id: str) -> dict[str, RunCurves]:
        assert experiment_id == "7"
        return self._runs


def curves(*epochs: EpochRecord) -> RunCurves:
    steps = (StepRecord(step=1, loss=2.0, grad_norm=0.5),)
    return RunCurves(status="FINISHED", tags={"device": "cpu"}, epochs=epochs, steps=steps)


class TestReadStudy:
    def test_curves_come_from_mlflow_and_gaps_from_optuna(self, study: optuna.Study) -> None:
        study.add_trial(finished(0, "a", [(2.0, 1.7), (1.9, 1.6), (1.8, 1.5)]))
        seen = (EpochRecord(epoch=1, train_loss=2.01, val_loss=1.71, epoch_seconds=3.0), EpochRecord(epoch=2))
        record = read_study(study, FakeTracking({"a": curves(*seen)}))  # type: ignore[arg-type]
        (trial,) = record.trials
        assert [(e.train_loss, e.val_loss, e.epoch_seconds) for e in trial.epochs] == [
            (2.01, 1.71, 3.0),
            (1.9, 1.6, None),
            (1.8, 1.5, None),
        ]
        assert (trial.steps[0].grad_norm, trial.tags) == (0.5, {"device": "cpu"})
        assert (record.experiment_id, record.parent_run_id) == ("7", "parent")

    def test_optuna_alone_is_enough(self, study: optuna.Study) -> None:
        study.add_trial(finished(0, "gone", [(2.0, 1.7), (1.9, 1.6)]))
        for tracking in (None, FakeTracking({})):
            record = read_study(study, tracking)  # type: ignore[arg-type]
            assert [(e.train_loss, e.val_loss) for e in record.trials[0].epochs] == [(2.0, 1.7), (1.9, 1.6)]

    def test_a_trial_that_begins_while_it_reads_is_of_the_next_reading(
        self, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study.add_trial(finished(0, None, [(2.0, 1.7)]))
        read = optuna.Study.get_trials

        def one_more(self: optuna.Study, *args: Any, **named: Any) -> Any:
            found = list(read(self, *args, **named))
            study.add_trial(finished(len(found), None, [(2.0, 1.7)]))
            return found

        monkeypatch.setattr(optuna.Study, "get_trials", one_more)
        assert len(read_study(study).trials) == 1

    def test_values_that_are_not_finite_are_none(self, study: optuna.Study) -> None:
        frozen = finished(0, None, [(2.0, 1.7), (1.9, 1.6)])
        frozen.intermediate_values[2] = float("nan")
        study.add_trial(frozen)
        assert [e.val_loss for e in read_study(study).trials[0].epochs] == [1.7, None]

    def test_the_definition_is_the_studys(self, study: optuna.Study) -> None:
        record = read_study(study)
        assert set(record.definition["space"]) == set(studies.load("rsicap").space)
        assert record.attrs["study"] == "rsicap"
        assert storage.DEFINITION not in record.attrs


@pytest.mark.parametrize(
    ("uri", "url"),
    [
        ("http://user:secret@host:5000/base/", "http://host:5000/base"),
        ("https://[::1]:443", "https://[::1]:443"),
        ("http://host/a)b c", "http://host/a%29b%20c"),
        ("sqlite:///runs/mlflow.db", None),
        ("postgresql://user:secret@host/db", None),
    ],
)
def test_links_lead_to_the_server_and_tell_no_password(uri: str, url: str | None) -> None:
    assert server_url(uri) == url


class TestCommandLine:
    @pytest.fixture
    def runs(self, study: optuna.Study, tmp_path: Path) -> Path:
        """A runs folder with one trial in both databases."""
        study_id = study.user_attrs[records.STUDY_ID]
        tracking = open_tracking(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts", study_id)
        parent = tracking.parent_run("rsicap", {})
        run_id = tracking.start_run(tracking.experiment("rsicap"), parent, name="trial 000", config={}, tags={})
        tracking.end_run(run_id, "FINISHED", {"state": "COMPLETE"})
        study.add_trial(finished(0, run_id, [(a, b) for a, b in falling(2.0, 1.5, 5)]))
        return tmp_path

    def test_writes_markdown_and_html_in_both_languages(self, runs: Path) -> None:
        run_id = storage.find_study(open_storage(f"sqlite:///{runs / 'optuna.db'}"), "rsicap").trials[0]
        for arguments, name in (
            ([], "rsicap/tuning-log.md"),
            (["--lang", "zh", "--format", "html"], "rsicap/tuning-log.zh.html"),
            (["--out", str(runs / "x" / "log.md")], "x/log.md"),
        ):
            result = CliRunner().invoke(app, ["--study", "rsicap", "--runs-dir", str(runs), *arguments])
            assert result.exit_code == 0, result.output
            assert result.stdout.strip() == str(runs / name)
            text = (runs / name).read_text()
            assert run_id.user_attrs[records.RUN_ID] in text
            assert f"--runs-dir {runs}" in text
        assert (runs / "x" / "log-plots" / "loss-curves.svg").is_file()

    def test_the_command_line_and_the_search_write_the_same(self, runs: Path, study: optuna.Study) -> None:
        CliRunner().invoke(app, ["--study", "rsicap", "--runs-dir", str(runs)])
        study_id = study.user_attrs[records.STUDY_ID]
        tracking = open_tracking(f"sqlite:///{runs / 'mlflow.db'}", runs / "artifacts", study_id)
        written = (runs / "rsicap" / "tuning-log.md").read_bytes()
        again = write.refresh(read_study(study, tracking), runs / "b", options=["--runs-dir", str(runs)])
        assert again[0].read_bytes() == written

    def test_says_which_studies_there_are(self, runs: Path) -> None:
        result = CliRunner().invoke(app, ["--study", "rsikap", "--runs-dir", str(runs)])
        assert isinstance(result.exception, StudyError)
        assert "did you mean 'rsicap'" in str(result.exception)

    def test_creates_no_database(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["--study", "rsicap", "--runs-dir", str(tmp_path / "none")])
        assert isinstance(result.exception, StorageError)
        assert "there is no database" in str(result.exception)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_is_no_file_to_write(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["--study", "rsicap", "--out", str(tmp_path)])
        assert isinstance(result.exception, StudyError) and "is a folder" in str(result.exception)
        assert list(tmp_path.iterdir()) == []
