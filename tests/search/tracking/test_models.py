"""Data and models in MLflow: a dataset input, a LoggedModel with metrics, a registered version; by the outbox too."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from search.places import Places
from search.tracking.delivery import Delivery
from search.tracking.outbox import STUDY, DataUsed, Model, Point, StudyBegun, Write
from search.tracking.recorder import RunRecorder
from search.tracking.runs import StudyRuns
from tests.search.tracking.recorded import started
from tests.support import template
from trainer.config import TrainConfig

LOAD = """
import sys
import mlflow
mlflow.set_registry_uri(sys.argv[1])
mlflow.set_tracking_uri(sys.argv[1])
print(mlflow.artifacts.download_artifacts("models:/demo@best"))
"""
"""The lines of docs/captions.md."""


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def model(adapter: Path, step: int = 3, value: float = 0.25) -> Model:
    return Model(
        path=str(adapter), name="demo", alias="best", step=step, metrics={"val_loss": value}, params={"lora_r": "8"}
    )


def recorded(runs: StudyRuns, name: str = "trial 000") -> RunRecorder:
    recorder = runs.begin(name, TrainConfig().model_dump(), {"trial": "0"})
    recorder(replace(started(10), data="/data/mine", data_fingerprint="4266c1d312c59ac5"))
    recorder.finish("FINISHED", state="COMPLETE")
    return recorder


@pytest.mark.parametrize("away", [False, True])
def test_the_best_adapter_is_loadable_from_the_registry(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    places = Places.of(tmp_path / "runs")
    places.runs_dir.mkdir()
    runs = StudyRuns(places, "demo")
    if away:
        from search.errors import Unavailable

        def refuse() -> None:
            raise Unavailable("away")

        monkeypatch.setattr(runs, "connect", refuse)
    recorder = recorded(runs)
    for _ in range(2):  # a search that is run again keeps the same
        runs.keep_model(recorder.run_id, model(adapter))
    fresh = StudyRuns(places, "demo")
    if away:
        assert fresh.outbox.runs()
        Delivery(fresh.outbox, "demo", fresh.connect).once()
    assert not fresh.outbox.runs()
    tracking = fresh.connect()
    client = tracking._client
    run = client.get_run(tracking.resolve("demo", recorder.run_id))
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("mine", "4266c1d312c59ac5")
    (version,) = client.search_model_versions("name = 'demo'")
    assert version.run_id == run.info.run_id
    (logged,) = client.search_logged_models([run.info.experiment_id])
    assert [(m.key, m.value, m.step, m.dataset_name) for m in logged.metrics] == [("val_loss", 0.25, 3, "mine")]
    assert logged.params == {"lora_r": "8"}
    # By the lines of the documentation.
    command = [sys.executable, "-c", LOAD, places.tracking_uri]
    done = template.run(command)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in Path(done.stdout.strip()).iterdir()} >= {f.name for f in adapter.iterdir()}


def test_a_study_may_have_a_dot_in_its_name(tmp_path: Path, adapter: Path) -> None:
    """MLflow takes it in the registry and not as a LoggedModel's name."""
    places = Places.of(tmp_path / "runs")
    places.runs_dir.mkdir()
    runs = StudyRuns(places, "rsicap.v2")
    recorder = recorded(runs)
    runs.keep_model(recorder.run_id, replace(model(adapter), name="rsicap.v2"))
    client = runs.connect()._client
    assert client.get_model_version_by_alias("rsicap.v2", "best").run_id == recorder.run_id


def test_points_of_the_study_and_of_captions_are_delivered_in_any_order(tmp_path: Path) -> None:
    """Trials side by side end in any order, and trial 0 is a step too; captions may be scored again."""
    places = Places.of(tmp_path / "runs")
    places.runs_dir.mkdir()
    runs = StudyRuns(places, "demo")
    recorder = recorded(runs)
    order = (3, 0, 5, 1, 2, 4)
    study = [Point("trial_val_loss", 1 - n / 100, n, 1000 + place) for place, n in enumerate(order)]
    scores = [Point("caption/test/cider_d", value, 6, 2000 + place) for place, value in enumerate((1.1, 1.35))]
    trained = [Point("epoch/val_loss", 0.5, epoch, 3000) for epoch in (1, 2, 2, 1)]  # a checkpoint's history again
    for _ in range(2):  # all of it once more, as by a process that was killed before it had noted it
        runs.outbox.append(STUDY, [StudyBegun(tags={}), Write(points=study, tags={})])
        runs.outbox.append(recorder.run_id, [Write(points=[*scores, *trained], tags={})])
        assert not Delivery(runs.outbox, "demo", runs.connect).once().rejected
    tracking = runs.connect()
    parent = tracking.find_parent("demo")
    assert parent is not None

    def steps(run_id: str, key: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in tracking._client.get_metric_history(run_id, key)]

    assert sorted(steps(parent, "trial_val_loss")) == [(n, 1 - n / 100) for n in range(6)]
    assert steps(recorder.run_id, "caption/test/cider_d") == [(6, 1.1), (6, 1.35)]
    assert [step for step, _ in steps(recorder.run_id, "epoch/val_loss")] == [1, 2]


def test_a_better_trial_takes_the_alias(tmp_path: Path, adapter: Path) -> None:
    places = Places.of(tmp_path / "runs")
    places.runs_dir.mkdir()
    runs = StudyRuns(places, "demo")
    first, second = recorded(runs), recorded(runs, "trial 001")
    runs.keep_model(first.run_id, model(adapter))
    runs.keep_model(second.run_id, model(adapter, step=5))
    client = runs.connect()._client
    assert client.get_model_version_by_alias("demo", "best").run_id == second.run_id
    assert len(client.search_model_versions("name = 'demo'")) == 2


def test_a_models_metric_is_no_second_point_of_its_runs_curve(tmp_path: Path, adapter: Path) -> None:
    places = Places.of(tmp_path / "runs")
    places.runs_dir.mkdir()
    runs = StudyRuns(places, "demo")
    recorder = recorded(runs)
    runs.add(recorder.run_id, [Point("val_loss", 0.1 + 0.2 * n, n, 1000 + n) for n in (1, 2, 3)], {})
    runs.keep_model(recorder.run_id, model(adapter, value=0.1 + 0.2 * 3))
    client = runs.connect()._client
    run_id = runs.connect().resolve("demo", recorder.run_id)
    history = client.get_metric_history(run_id, "val_loss")
    assert [(point.step, point.timestamp) for point in history] == [(1, 1001), (2, 1002), (3, 1003)]
    (logged,) = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert [(m.key, m.value, m.step) for m in logged.metrics] == [("val_loss", 0.1 + 0.2 * 3, 3)]


def test_data_that_another_trial_has_just_named_is_named_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials that begin at once: MLflow lets one of them add the data, and fails the others."""
    places = Places.of(tmp_path / "runs")
    places.runs_dir.mkdir()
    tracking = StudyRuns(places, "demo").connect()
    experiment, parent = tracking.experiment("demo"), tracking.some_parent("demo", {})
    run_id = tracking.start_run(experiment, parent, name="a", config={}, tags={})
    tries = []
    real = tracking._client.log_inputs

    def log_inputs(*arguments: Any, **named: Any) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name")
        real(*arguments, **named)

    monkeypatch.setattr(tracking._client, "log_inputs", log_inputs)
    tracking.log_data(run_id, DataUsed(name="mine", digest="1", source="/mine", profile={}))
    assert len(tries) == 3
    assert len(tracking._client.get_run(run_id).inputs.dataset_inputs) == 1


def test_what_the_outbox_keeps_is_read_back(tmp_path: Path) -> None:
    from search.tracking.outbox import Outbox

    entries = [DataUsed(name="a", digest="b", source="c", profile={"d": "e"}), model(tmp_path)]
    outbox = Outbox(tmp_path / "outbox")
    outbox.append("run", entries)
    assert [kept.entry for kept in outbox.read("run")] == entries
