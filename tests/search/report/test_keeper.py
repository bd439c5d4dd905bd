"""The tuning log while a study runs: written after trials, not once for each, and never at the search's cost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from mlflow.tracking import MlflowClient
from optuna_dashboard import get_note

from search import records
from search.errors import StorageError
from search.places import Places
from search.report import keeper as logkeeper
from search.report.keeper import LogKeeper
from search.space import Float
from search.storage import studies as store
from search.storage.database import close_storage, open_storage
from search.study import Study
from search.tracking.client import Tracking, open_tracking
from search.tracking.runs import StudyRuns
from tests.search.report.test_verdict import repeated
from trainer.config import TrainConfig

SPACE = {"learning_rate": Float(1e-6, 1e-3, log=True)}
DEFINITION = Study(name="demo", description="for the log", space=SPACE, n_trials=3)


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    folder = tmp_path_factory.mktemp("mlflow")
    return open_tracking(f"sqlite:///{folder}/mlflow.db", folder / "artifacts")


@pytest.fixture
def study(tmp_path: Path) -> Iterator[optuna.Study]:
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    yield store.open_study(storage, DEFINITION)
    close_storage(storage)


class Counted(LogKeeper):
    """Counts what it writes, and fails or waits when told to."""

    def __init__(self, do: Callable[[int], None] = lambda _: None) -> None:
        super().__init__(None, None, Path("nowhere"), ())  # type: ignore[arg-type]
        self.writes = 0
        self.wrote = threading.Condition()
        self._do = do

    def _write(self) -> list[Path]:
        with self.wrote:
            self.writes += 1
            self.wrote.notify_all()
        self._do(self.writes)
        return [Path("tuning-log.md")]

    def wait_for(self, writes: int) -> None:
        with self.wrote:
            assert self.wrote.wait_for(lambda: self.writes >= writes, timeout=10), f"{self.writes} of {writes} writes"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logkeeper, "PAUSE_S", 0.01)


def test_it_writes_after_a_trial_and_not_before(quick: None) -> None:
    keeper = Counted()
    keeper.start()
    time.sleep(0.1)
    assert keeper.writes == 0
    for trials in (1, 2):
        keeper.due()
        keeper.wait_for(trials)
        time.sleep(0.1)
        assert keeper.writes == trials
    assert keeper.close() == [Path("tuning-log.md")]
    assert keeper.writes == 3 and not keeper.is_alive()


def test_trials_that_end_meanwhile_share_one_update(quick: None) -> None:
    go_on = threading.Event()
    keeper = Counted(lambda n: None if n > 1 else go_on.wait(10) and None)
    keeper.start()
    keeper.due()
    keeper.wait_for(1)
    for _ in range(20):
        keeper.due()
    go_on.set()
    keeper.wait_for(2)
    time.sleep(0.1)
    assert keeper.writes == 2
    keeper.close()


def test_closing_waits_for_no_pause_and_a_short_study_is_written_once() -> None:
    assert logkeeper.PAUSE_S >= 5
    keeper = Counted()
    keeper.start()
    for _ in range(3):
        keeper.due()
    time.sleep(0.1)  # once its thread is in the pause: the first write would come before
    began = time.monotonic()
    keeper.close()
    assert time.monotonic() - began < 2 and keeper.writes == 1


def test_an_error_is_logged_and_the_next_trial_s_end_writes_again(
    quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(n: int) -> None:
        if n == 1:
            raise OSError("no space left on device")

    keeper = Counted(fail)
    with caplog.at_level(logging.ERROR, "search.report.keeper"):
        keeper.start()
        keeper.due()
        keeper.wait_for(1)
        keeper.due()
        keeper.wait_for(2)
        assert keeper.close() != []
    (logged,) = caplog.records
    assert logged.exc_info is not None and "no space left" in str(logged.exc_info[1])


def test_an_error_at_the_end_is_logged_too(quick: None, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: int) -> None:
        raise StorageError("the server is away")

    keeper = Counted(fail)
    keeper.start()
    assert keeper.close() == []
    assert [str(r.exc_info[1]) for r in caplog.records if r.exc_info] == ["the server is away"]


def test_log_note_and_artifacts_of_the_study_s_run(study: optuna.Study, tracking: Tracking, tmp_path: Path) -> None:
    parent = tracking.parent_run("demo", {})
    folder = tmp_path / "demo"
    book = StudyRuns(Places.of(tmp_path, tracking=tracking.uri), "demo")
    keeper = LogKeeper(study, book, folder, ("--runs-dir", "elsewhere"))
    keeper.start()
    trial = study.ask()
    trial.set_user_attr(records.CONFIG, TrainConfig().model_dump(mode="json"))
    study.tell(trial, 1.25)
    keeper.due()
    deadline = time.monotonic() + 60
    while not (folder / "tuning-log.md").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    written = keeper.close()
    assert {"tuning-log.md", "tuning-log.zh.md"} <= {path.name for path in written}
    assert "--runs-dir elsewhere" in (folder / "tuning-log.md").read_text()
    assert get_note(study).startswith("1 trials (1 COMPLETE)")
    client = MlflowClient(tracking.uri)
    kept = {file.path for file in client.list_artifacts(parent)}
    assert kept == {"tuning-log.html", "tuning-log.zh.html"}, "Markdown's pictures are text in MLflow"
    copied = Path(client.download_artifacts(parent, "tuning-log.html", str(tmp_path))).read_text()
    assert copied == (folder / "tuning-log.html").read_text()
    assert "--runs-dir elsewhere" in copied
    data = client.get_run(parent).data
    assert data.metrics == {"trial_val_loss": 1.25}, "a trial told by hand has no epoch, and is not the best"
    assert data.tags["mlflow.note.content"].startswith("1 trials (1 COMPLETE)")


def test_the_notes_of_a_decided_study_say_what_its_log_says(
    study: optuna.Study, tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They said "not decided yet" for good, and gave the configuration of the lowest loss: what they were made of had
    no repeats."""
    record = repeated(a=[1.50, 1.55, 1.481], b=[1.40, 1.45, 1.38])  # the lowest loss is trial 0's, the verdict trial 1
    monkeypatch.setattr("search.reading.read_study", lambda *_, **__: record)
    parent = tracking.parent_run("demo", {})
    keeper = LogKeeper(study, StudyRuns(Places.of(tmp_path, tracking=tracking.uri), "demo"), tmp_path / "demo", ())
    keeper.start()
    keeper.due()
    (log,) = (path.read_text() for path in keeper.close() if path.name == "tuning-log.md")
    sentence = "winner: trial 1, better than the other one on the same 3 seeds and splits"
    assert sentence in log
    for note in (get_note(study), MlflowClient(tracking.uri).get_run(parent).data.tags["mlflow.note.content"]):
        assert f"**Verdict**: {sentence}" in note and "not decided" not in note
        assert "Best: trial 1, validation loss 1.4100 at epoch 2, named by the verdict" in note
        assert "the lowest is that of trial 0" in note and '"learning_rate": 0.0002,' in note
        assert note.startswith("2 trials (2 COMPLETE), 4 epochs, and 6 repeats, 12 epochs")
        assert note.count("repeat of 1") == 3, "the leaderboard has the repeats"
    assert len(keeper.trials) == 8
