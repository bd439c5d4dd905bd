"""Runs in MLflow itself: what is written is read back, continued, and ended."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from search import records
from search.errors import StorageError
from search.tracking import tags
from search.tracking.client import Tracking, as_text, open_tracking
from search.tracking.judgement import description
from search.tracking.mlflow_private import NOTE
from search.tracking.outbox import Point
from search.tracking.reader import ClientReader
from search.tracking.recorder import run_status
from tests.search.tracking.recorded import copy_database, finding, new_run, whole_run
from trainer.config import TrainConfig


def test_files_of_runs_move_with_the_folder(tracking: Tracking, tmp_path: Path) -> None:
    # An underscore is a wildcard of LIKE, which takes a and A for the same; a blank is written as %20.
    first, second = new_run(tracking, study="a_b c"), new_run(tracking, study="axb c")
    for run_id in (first, second):
        tracking.log_text(run_id, "before", "note.txt")
    tracking.experiment("a_b c")  # nothing has moved yet
    moved = tmp_path / "else where"
    moved.mkdir()
    copy_database(tmp_path / "mlflow.db", moved / "mlflow.db")
    (tmp_path / "artifacts").rename(moved / "artifacts")
    there = open_tracking(f"sqlite:///{moved}/mlflow.db", moved / "artifacts")
    there.experiment("a_b c")
    there.log_text(new_run(there, study="a_b c"), "new", "new.txt")
    assert not (tmp_path / "artifacts").exists()
    assert len(list((moved / "artifacts" / "a_b c").rglob("*.txt"))) == 2
    # MLflow keeps in mind, within a process, where it last wrote a run's files: the place is read instead.
    location = (moved / "artifacts" / "a_b c").as_uri()
    places = {run_id: there._client.get_run(run_id).info.artifact_uri for run_id in (first, second)}
    assert places[first] == f"{location}/{first}/artifacts"
    assert places[second] == f"{(tmp_path / 'artifacts' / 'axb c').as_uri()}/{second}/artifacts"


def test_a_trial_as_mlflow_has_it(tracking: Tracking) -> None:
    run_id = new_run(tracking, trial="0")
    recorder = tracking.recorder(run_id)
    for event in whole_run(2, 40):
        recorder(event)
    recorder.finish(
        "FINISHED", state="PRUNED", reason="rising", findings=[finding("overfitting")], description="# What happened"
    )
    client = MlflowClient(tracking.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    assert run.data.params == {k: as_text(v) for k, v in TrainConfig().model_dump().items()}
    assert run.data.tags["mlflow.parentRunId"] == tracking.parent_run("demo", {})
    assert run.data.tags["mlflow.note.content"] == "# What happened"
    shown = {key for key in run.data.tags if not key.startswith("mlflow.")}
    assert {"trial", "state", "reason", "finding"} < shown and len(shown) <= tags.MOST
    kept = json.loads(Path(client.download_artifacts(run_id, tags.FACTS)).read_text())
    assert kept["host"] and kept["version.torch"] and shown.isdisjoint(kept)
    assert tracking.tags(run_id).items() >= {**kept, "trial": "0"}.items(), "programs read all of them"
    found = client.search_runs([run.info.experiment_id], "tags.finding = 'overfitting'")
    assert [r.info.run_id for r in found] == [run_id]
    assert [a.path for a in client.list_artifacts(run_id)] == ["adapted_modules.txt", tags.FACTS]


def test_two_searches_may_describe_one_experiment_at_once(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow looks for a tag and then inserts it: of two servers' threads at once PostgreSQL refuses one."""
    experiment = tracking.experiment("demo")
    client, refused = tracking._client, []
    real = client.set_experiment_tag

    def at_once(experiment_id: str, key: str, value: str) -> None:
        if not refused:
            refused.append(key)
            real(experiment_id, key, "the other's")
            raise MlflowException('(psycopg.errors.UniqueViolation) duplicate key ... constraint "experiment_tag_pk"')
        real(experiment_id, key, value)

    monkeypatch.setattr(client, "set_experiment_tag", at_once)
    tracking.describe("demo", {"what": "ours"})
    assert refused == ["what"]
    assert MlflowClient(tracking.uri).get_experiment(experiment).tags["what"] == "ours"


def test_two_searches_may_write_the_params_of_one_run_at_once(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with tags, and with more than two: what was refused with the duplicate is written, too."""
    client, refused = tracking._client, []
    real = client.log_batch

    def at_once(run_id: str, **what: Any) -> None:
        if what.get("params") and len(refused) < 2:
            refused.append(what["params"][0].key)
            real(run_id, params=what["params"][:1])
            raise MlflowException('(psycopg.errors.UniqueViolation) duplicate key ... constraint "param_pk"')
        real(run_id, **what)

    monkeypatch.setattr(client, "log_batch", at_once)
    run_id = tracking.parent_run("demo", {}, {"objective": "loss", "sampler": "tpe"})
    assert refused == ["objective", "objective"]
    assert MlflowClient(tracking.uri).get_run(run_id).data.params == {"objective": "loss", "sampler": "tpe"}


def test_params_can_be_given_back_as_settings() -> None:
    config = TrainConfig(max_samples=None, target_modules=("query", "value"), learning_rate=3e-5)
    settings = [f"{k}={as_text(v)}" for k, v in config.model_dump().items()]
    assert TrainConfig.parse_settings(settings) == config


def test_what_is_read_back_is_what_mlflows_client_reads(tracking: Tracking) -> None:
    run_id = new_run(tracking)
    recorder = tracking.recorder(run_id)
    for event in whole_run(2, 40):
        recorder(event)
    recorder.finish("FINISHED", state="COMPLETE")
    client = MlflowClient(tracking.uri)
    history = {m.step: m.value for m in client.get_metric_history(run_id, "step/loss")}
    assert {s.step: s.loss for s in tracking.steps(run_id)} == history
    assert tracking.epochs(run_id)[1] == records.EpochRecord(
        epoch=2,
        train_loss=1.0,
        val_loss=1.5,
        learning_rate=1e-4,
        grad_norm_mean=0.5,
        grad_norm_max=0.9,
        epoch_seconds=2.0,
        eval_seconds=0.4,
        samples_per_second=100.0,
        data_wait_fraction=pytest.approx(0.2),
        peak_memory_gib=0.5,
    )
    runs = tracking.runs(tracking.experiment("demo"))
    assert set(runs) == {run_id, tracking.parent_run("demo", {})}
    assert runs[run_id].epochs == tracking.epochs(run_id)
    assert runs[run_id].steps == tracking.steps(run_id)
    assert runs[run_id].tags == tracking.tags(run_id) == tags.inward(client.get_run(run_id).data.tags)
    assert runs[run_id].status == "FINISHED"


def test_when_epochs_were_reported_is_read_alike_from_database_and_server(tracking: Tracking) -> None:
    run_id = new_run(tracking, record_id="local-7")
    new_run(tracking, name="trial 1")  # without epochs
    for at in (5_000, 9_000):  # reported again by who took it up
        tracking.write(run_id, [Point("epoch_seconds", 2.0, epoch, at + epoch) for epoch in (1, 2)], {})
    experiment = tracking.experiment("demo")
    times = {run_id: {1: 5.001, 2: 5.002}, "local-7": {1: 5.001, 2: 5.002}}
    assert tracking.times(experiment) == ClientReader(MlflowClient(tracking.uri)).times(experiment) == times


def test_a_run_taken_up_again_continues(tracking: Tracking) -> None:
    run_id = new_run(tracking)
    events = whole_run(2, 40)
    recorder = tracking.recorder(run_id)
    for event in events[:60]:
        recorder(event)
    found = [finding("slow_epoch")]
    ours = description("WAITING", "paused", "paused after epoch 1", [])
    about = {"detail": "paused after epoch 1", "best_epoch": "1"}
    recorder.finish("KILLED", state="FAIL", reason="interrupted", findings=found, tags=about, description=ours)
    tracking.resume_run(run_id)
    tags = tracking.tags(run_id)
    assert tags["state"] == "RUNNING"
    stale = {"reason", "detail", "best_epoch", "finding", "finding.slow_epoch", NOTE}
    assert not stale & MlflowClient(tracking.uri).get_run(run_id).data.tags.keys() and not stale & tags.keys()
    again = tracking.recorder(run_id)
    assert again.logged.last_epoch == 1
    for event in [events[0], *events[42:]]:
        again(event)
    again.finish("FINISHED", state="COMPLETE")
    client = MlflowClient(tracking.uri)
    history = client.get_metric_history(run_id, "step/loss")
    assert [m.step for m in history] == list(range(1, 81))
    assert [m.timestamp for m in history] == sorted(m.timestamp for m in history)
    assert [e.epoch for e in tracking.epochs(run_id)] == [1, 2]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_writing_twice_leaves_one(tracking: Tracking) -> None:
    run_id = new_run(tracking)
    points = [Point("step/loss", 1.0, s, 1_000) for s in range(2_500)]
    for _ in range(2):
        tracking.write(run_id, points, {f"t{i}": "x" * 9_000 for i in range(150)})
    assert len(MlflowClient(tracking.uri).get_metric_history(run_id, "step/loss")) == 2_500
    assert len(tracking.tags(run_id)["t149"]) == 8_000


def test_one_parent_a_study_found_again(tracking: Tracking) -> None:
    first = tracking.parent_run("demo", {"version.torch": "1"})
    assert tracking.parent_run("demo", {"version.torch": "2"}) == first
    assert tracking.tags(first)["version.torch"] == "2"
    assert tracking.parent_run("other", {}) != first
    assert tracking.find_parent("never") is None


def test_a_deleted_experiment_says_the_way_out(tracking: Tracking) -> None:
    experiment = tracking.experiment("demo")
    MlflowClient(tracking.uri).delete_experiment(experiment)
    with pytest.raises(StorageError, match="mlflow experiments restore"):
        tracking.experiment("demo")


def test_runs_of_dead_processes_are_ended(tracking: Tracking) -> None:
    dead, alive = new_run(tracking, worker="dead"), new_run(tracking, worker="alive")
    experiment = tracking.experiment("demo")
    assert tracking.close_dangling(experiment, lambda tags: tags.get("worker") == "dead") == (dead,)
    runs = tracking.runs(experiment)
    assert (runs[dead].status, runs[dead].tags["reason"]) == ("KILLED", "lost")
    assert runs[alive].status == "RUNNING"
    with pytest.raises(StorageError):
        tracking.tags("0" * 32)


@pytest.mark.parametrize(
    ("state", "reason", "status"),
    [
        ("COMPLETE", "finished", "FINISHED"),
        ("PRUNED", "non_finite", "FINISHED"),
        ("FAIL", "error", "FAILED"),
        ("FAIL", "lost", "KILLED"),
        ("FAIL", "interrupted", "KILLED"),
    ],
)
def test_status(state: str, reason: str, status: str) -> None:
    assert run_status(state, reason) == status
