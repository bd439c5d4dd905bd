"""Recording runs: what is written, what survives failures, and that all of it is read back."""

import contextlib
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from mlflow.tracking import MlflowClient

from search import records
from search.errors import StorageError, Unavailable
from search.tracking import client, tags
from search.tracking import environment as env
from search.tracking.client import Tracking, as_text, open_tracking
from search.tracking.outbox import End, Outbox, Point, Status, Write
from search.tracking.recorder import Logged, RunRecorder, run_status
from search.tracking.writer import send
from search.urls import shown
from tests.support import template
from tests.support.template import Forked
from trainer.common.cache import cache_folder
from trainer.config import TrainConfig
from trainer.events import (
    Diverged,
    EpochEnded,
    EpochTiming,
    Event,
    MicroBatchReduced,
    NonFinite,
    OutOfMemory,
    RunStarted,
    StepEnded,
    StepTiming,
)

BAD = NonFinite(tensor="grad: q.lora_A", value="nan", after_update=False, detail="float16, eps rounds to 0")


def started(total_steps: int, epochs: int = 2) -> RunStarted:
    return RunStarted(
        num_train_samples=160,
        num_val_samples=40,
        steps_per_epoch=total_steps // epochs,
        total_steps=total_steps,
        warmup_steps=10,
        trainable_parameters=1234,
        adapted_modules=("qformer.a", "qformer.b"),
        skipped_rows=(),
        data_fingerprint="d" * 16,
        model_fingerprint="m" * 16,
        device="cpu",
        num_threads=1,
        resumed_from_epoch=0,
    )


def step(number: int, epoch: int = 1, *, loss: float | None = None, norm: float = 0.5) -> StepEnded:
    return StepEnded(
        step=number,
        epoch=epoch,
        loss=1 / number if loss is None else loss,
        grad_norm=norm,
        learning_rate=number * 1e-6,
        num_samples=4,
        num_tokens=100,
        timing=StepTiming(step_s=0.05, data_wait_s=0.01),
    )


def epoch(number: int, last_step: int, *, val_loss: float = 1.5) -> EpochEnded:
    timing = EpochTiming(
        epoch_s=2.0, train_s=1.5, data_wait_s=0.3, eval_s=0.4, checkpoint_s=0.1, samples_per_s=100, peak_memory_gib=0.5
    )
    return EpochEnded(
        epoch=number,
        step=last_step,
        train_loss=2.0 / number,
        val_loss=val_loss,
        learning_rate=1e-4,
        grad_norm_mean=0.5,
        grad_norm_max=0.9,
        nonfinite_steps=0,
        timing=timing,
    )


def whole_run(epochs: int, steps: int) -> list[Event]:
    """The events of a run of `epochs` epochs of `steps` steps."""
    events: list[Event] = [started(epochs * steps, epochs)]
    for number in range(1, epochs + 1):
        events += [step(s, number) for s in range((number - 1) * steps + 1, number * steps + 1)]
        events.append(epoch(number, number * steps))
    return events


class Store:
    """A RunStore in memory that fails when told to."""

    def __init__(self, fail: Callable[[], Exception | None] = lambda: None) -> None:
        self.points: list[Point] = []
        self.tags: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.ended: Status | None = None
        self.writes = 0
        self._fail = fail

    def write(self, run_id: str, points: Iterable[Point], tags: Mapping[str, str]) -> None:
        self.writes += 1
        if (error := self._fail()) is not None:
            raise error
        self.points += points
        self.tags.update(tags)

    def log_text(self, run_id: str, text: str, file: str) -> None:
        self.texts[file] = text

    def end_run(
        self, run_id: str, status: Status, tags: Mapping[str, str], description: str, end_ms: int | None = None
    ) -> None:
        self.tags.update(tags)
        self.ended = status

    def curve(self, key: str) -> dict[int, float]:
        found = [(p.step, p.value) for p in self.points if p.key == key]
        assert len(dict(found)) == len(found), f"{key} has a step twice"
        return dict(found)


def record(events: Iterable[Event], store: Store | None = None, logged: Logged | None = None) -> Store:
    store = store or Store()
    recorder = RunRecorder(store, "run", logged, close_s=5)
    for event in events:
        recorder(event)
    recorder.finish("FINISHED", state="COMPLETE", reason="finished")
    return store


# ---------------------------------------------------------------------- what is written


def test_a_short_run_keeps_every_step_and_all_metrics_of_an_epoch() -> None:
    store = record(whole_run(2, 40))
    assert store.curve("step/loss") == {s: 1 / s for s in range(1, 81)}
    assert store.curve("step/learning_rate") == {s: s * 1e-6 for s in range(1, 81)}
    assert store.curve("val_loss") == {1: 1.5, 2: 1.5}
    assert store.curve("data_wait_fraction") == {1: pytest.approx(0.2), 2: pytest.approx(0.2)}
    keys = {p.key for p in store.points}
    assert keys == {
        *("train_loss", "val_loss", "learning_rate", "grad_norm_mean", "grad_norm_max", "epoch_seconds"),
        *("eval_seconds", "samples_per_second", "data_wait_fraction", "peak_memory_gib"),
        *("step/loss", "step/grad_norm", "step/learning_rate"),
    }
    assert store.tags["data_fingerprint"] == "d" * 16
    assert store.tags["step_window"] == "1"
    assert store.texts["adapted_modules.txt"] == "qformer.a\nqformer.b\n"


def test_every_field_of_an_epochs_record_is_a_metric() -> None:
    """A metric that is added to `EpochRecord` and `epoch_record` is recorded without further code."""
    made = records.epoch_record(epoch(1, 40))
    assert None not in vars(made).values()
    store = record([epoch(1, 40)])
    assert {p.key: p.value for p in store.points} == {k: v for k, v in vars(made).items() if k != "epoch"}
    columns = {f.name: f.metadata for f in fields(records.EpochRecord) if f.metadata}
    assert columns.keys() == {"train_loss", "val_loss"}, "the table of epochs in docs/example"
    assert all(m["heading"].keys() == {"en", "zh"} and format(1.0, m["format"]) for m in columns.values())


def test_a_long_run_is_windowed_below_2000_points_and_no_spike_is_lost() -> None:
    events = whole_run(5, 1_000)
    spike = 2_345
    events = [replace(e, grad_norm=1e4) if isinstance(e, StepEnded) and e.step == spike else e for e in events]
    store = record(events)
    steps = [p for p in store.points if p.key.startswith("step/")]
    assert 1_000 < len(steps) <= 2_000
    highest = store.curve("step/grad_norm_max")
    assert max(highest.values()) == 1e4
    assert len(highest) <= 325  # what MLflow's charts draw whole, and a few for windows cut by an epoch's end
    width = int(store.tags["step_window"])
    first = sum(1 / s for s in range(1, width + 1)) / width
    assert store.curve("step/loss")[width] == pytest.approx(first)
    assert {p.step for p in steps} >= {1_000, 2_000, 5_000}, "windows end where epochs end"


def test_values_that_are_not_finite_become_tags() -> None:
    bad = replace(step(2, loss=math.nan, norm=math.inf), nonfinite=BAD)
    later = replace(step(3, loss=math.nan, norm=math.nan), nonfinite=replace(BAD, tensor="loss"))
    events: list[Event] = [started(80), step(1), bad, later, epoch(1, 40, val_loss=math.nan)]
    events += [epoch(2, 80, val_loss=math.inf), Diverged(step=4, epoch=1, first_bad_step=2, cause=BAD)]
    store = record(events)
    assert all(math.isfinite(p.value) for p in store.points)
    assert store.curve("step/loss") == {1: 1.0}
    assert store.curve("val_loss") == {}
    assert store.tags["nonfinite.step"] == "2"
    assert store.tags["nonfinite.tensor"] == "grad: q.lora_A"
    assert store.tags["nonfinite.steps"] == "2"
    assert store.tags["nonfinite.val_loss"] == "epoch 1"
    assert store.tags["diverged.step"] == "4"


def test_memory_events_are_tags() -> None:
    store = record([MicroBatchReduced(step=3, micro_batch_size=2), OutOfMemory(step=5, detail="12 GiB asked")])
    assert store.tags["micro_batch_size"] == "2"
    assert store.tags["out_of_memory.step"] == "5"
    assert store.tags["out_of_memory.detail"] == "12 GiB asked"


def test_findings_state_and_reason_are_tags() -> None:
    store = Store()
    recorder = RunRecorder(store, "run")
    recorder.finish("FINISHED", state="PRUNED", reason="rising", findings=("overfitting", "oscillating"))
    recorder.finish("FAILED", state="FAIL")
    assert store.ended == "FINISHED"
    expected = {
        "state": "PRUNED",
        "reason": "rising",
        "finding": "overfitting",
        "findings": "overfitting, oscillating",
    }
    assert store.tags == expected | {"finding.overfitting": "true", "finding.oscillating": "true"}


def test_a_resumed_run_doubles_nothing_and_ends_as_if_never_interrupted() -> None:
    events = whole_run(3, 50)
    whole = record(events)
    interrupted = Store()
    cut = events.index(epoch(2, 100)) - 10  # ten steps before the end of the second epoch
    record(events[:cut], interrupted)
    last: dict[str, int] = {}
    for point in interrupted.points:
        last[point.key] = max(last.get(point.key, 0), point.step)
    again = events.index(epoch(1, 50))  # resumed from the first epoch's checkpoint, whose history is told again
    record([events[0], *events[again:]], interrupted, Logged(steps=last, tags=interrupted.tags))
    for key in {p.key for p in whole.points}:
        assert interrupted.curve(key) == whole.curve(key)


# ---------------------------------------------------------------------- when the store fails


def test_what_the_store_does_not_take_goes_to_the_outbox_with_all_that_follows(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "spool")
    errors = iter([None, Unavailable("locked")])
    store = Store(lambda: next(errors, None))
    recorder = RunRecorder(store, "run", outbox=outbox)
    events = whole_run(2, 40)
    recorder(events[0])
    while store.writes == 0:
        time.sleep(0.01)
    for event in events[1:]:
        recorder(event)
    recorder.finish("FINISHED", state="COMPLETE", reason="finished")
    assert store.curve("step/loss") == {} and store.ended is None
    assert recorder.problem == "locked" and recorder.writer.lost == 0
    kept = [entry for entry, _ in outbox.read("run")]
    for entry in kept:
        send(store, "run", entry)
    assert store.curve("step/loss") == {s: 1 / s for s in range(1, 81)}
    assert store.ended == "FINISHED" and store.tags["reason"] == "finished"


def test_without_an_outbox_what_is_lost_is_told() -> None:
    recorder = RunRecorder(Store(lambda: Unavailable("database is locked")), "run")
    recorder(step(1))
    with pytest.raises(StorageError, match="4 metrics and tags could not be recorded: database is locked"):
        recorder.finish("FINISHED", state="COMPLETE")


@pytest.mark.parametrize("error", [StorageError("run was deleted"), KeyError("bug")])
def test_what_is_refused_for_good_is_kept_apart_and_later_writes_go_on(error: Exception, tmp_path: Path) -> None:
    errors = iter([error])
    store = Store(lambda: next(errors, None))
    outbox = Outbox(tmp_path / "spool")
    recorder = RunRecorder(store, "run", outbox=outbox)
    recorder(started(40))
    while store.writes == 0:
        time.sleep(0.01)
    recorder(epoch(1, 40))
    recorder.finish("FINISHED", state="COMPLETE")
    assert store.curve("val_loss") == {1: 1.5}
    assert outbox.runs() == []
    rejected = (tmp_path / "spool" / "run.rejected").read_text()
    assert "steps_per_epoch" in rejected and ("run was deleted" in rejected or "KeyError: 'bug'" in rejected)


def test_a_store_that_hangs_holds_up_no_trial(tmp_path: Path) -> None:
    release = threading.Event()

    def hang() -> None:
        release.wait(30)

    store, outbox = Store(hang), Outbox(tmp_path / "spool")
    recorder = RunRecorder(store, "run", outbox=outbox, close_s=0.2)
    for event in whole_run(1, 40):
        recorder(event)
    began = time.perf_counter()
    recorder.finish("FINISHED", state="COMPLETE")
    assert time.perf_counter() - began < 2
    kept = [entry for entry, _ in outbox.read("run")]
    assert sum(len(entry.points) for entry in kept if isinstance(entry, Write)) == 3 * 40 + 10
    assert isinstance(kept[-1], End)
    release.set()
    recorder.writer.join()
    assert store.ended is None, "the thread that hung wrote on"


def test_training_never_waits_for_the_store() -> None:
    release = threading.Event()

    def hang() -> None:
        release.wait(30)

    store = Store(hang)
    recorder = RunRecorder(store, "run")
    began = time.perf_counter()
    for event in whole_run(15, 40):
        recorder(event)
    assert time.perf_counter() - began < 1
    assert store.points == []
    release.set()
    recorder.finish("FINISHED", state="COMPLETE")
    assert len(store.curve("step/loss")) == 600


# ---------------------------------------------------------------------- MLflow itself


def copy_database(source: Path, target: Path) -> None:
    """A copy by SQLite itself: what lies in the write-ahead log is part of it."""
    with contextlib.closing(sqlite3.connect(source)) as old, contextlib.closing(sqlite3.connect(target)) as new:
        old.backup(new)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: creating them takes seconds, once is enough."""
    folder = tmp_path_factory.mktemp("mlflow")
    open_tracking(f"sqlite:///{folder}/mlflow.db", folder / "artifacts")
    return folder / "mlflow.db"


@pytest.fixture
def tracking(empty_database: Path, tmp_path: Path) -> Iterator[Tracking]:
    copy_database(empty_database, tmp_path / "mlflow.db")
    yield open_tracking(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "artifacts")


def new_run(tracking: Tracking, study: str = "demo", name: str = "trial 0", **tags: str) -> str:
    experiment = tracking.experiment(study)
    parent = tracking.parent_run(study, {})
    return tracking.start_run(experiment, parent, name=name, config=TrainConfig().model_dump(), tags=tags)


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
        "FINISHED", state="PRUNED", reason="rising", findings=("overfitting",), description="# What happened"
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


def test_a_run_taken_up_again_continues(tracking: Tracking) -> None:
    run_id = new_run(tracking)
    events = whole_run(2, 40)
    recorder = tracking.recorder(run_id)
    for event in events[:60]:
        recorder(event)
    recorder.finish("KILLED", state="FAIL", reason="interrupted", findings=("slow_epoch",))
    tracking.resume_run(run_id)
    tags = tracking.tags(run_id)
    assert tags["state"] == "RUNNING"
    assert not {"reason", "finding", "finding.slow_epoch"} & tags.keys()
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


# ---------------------------------------------------------------------- opening


OPEN = """
import sys, warnings, logging
from pathlib import Path
from search.tracking.client import open_tracking
tracking = open_tracking(sys.argv[1], Path(sys.argv[2]))
tracking.experiment("demo")
print(tracking.parent_run("demo", {}))
from mlflow.telemetry.utils import is_telemetry_disabled
assert is_telemetry_disabled()
"""


def test_processes_that_start_at_once_share_one_store_and_are_silent(tmp_path: Path) -> None:
    # pytest and CI switch telemetry off by themselves: without their variables it must be ours that does.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "CI", "GITHUB", "MLFLOW", "DO_NOT"))}
    command = ["-c", OPEN, f"sqlite:///{tmp_path}/runs/mlflow.db", str(tmp_path / "a")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": kept}
    imports = subprocess.Popen([sys.executable, "-W", "error", *command], text=True, **pipes)
    at_once = [Forked([sys.executable, *command], **pipes) for _ in range(3)]
    done = [each.communicate(timeout=120) for each in (*at_once, imports)]
    assert [err for _, err in done] == [""] * 4
    assert len({out for out, _ in done}) == 1


KILLED = """
import os, sys, sqlalchemy
from sqlalchemy.engine import Engine
from pathlib import Path
from search.tracking.client import open_tracking
left = int(sys.argv[3])
@sqlalchemy.event.listens_for(Engine, "after_cursor_execute")
def count(connection, cursor, statement, *_):
    global left
    left -= statement.strip().upper().startswith(("CREATE", "ALTER", "DROP"))
    if left < 0:
        os._exit(9)
open_tracking(sys.argv[1], Path(sys.argv[2]))
"""


@pytest.mark.parametrize("statements", [1, 90])
def test_killed_while_the_tables_are_made_the_next_one_makes_them(
    tmp_path: Path, statements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-c", KILLED, uri, str(tmp_path / "a"), str(statements)]
    assert template.run(command).returncode == 9
    tracking = open_tracking(uri, tmp_path / "a")
    assert new_run(tracking)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_tables_are_made_once_and_again_where_the_kept_file_is_damaged(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made,) = cache_folder().glob("mlflow-*.db")
    kept = tmp_path / "cache" / made.name
    kept.parent.mkdir()
    shutil.copy(made, kept)
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(kept.parent))
    opened: list[str] = []
    real = client._client
    monkeypatch.setattr(client, "_client", lambda uri: (opened.append(uri), real(uri))[1])
    second = f"sqlite:///{tmp_path}/second.db"
    assert new_run(open_tracking(second, tmp_path / "a"))
    assert opened == [second], "the tables were made again"
    whole = kept.read_bytes()
    damaged = whole[: len(whole) // 2] + b"\x5a" * 8_192 + whole[len(whole) // 2 + 8_192 :]
    for name, content in (("third", whole[:50_000]), ("fourth", damaged)):
        kept.write_bytes(content)
        assert new_run(open_tracking(f"sqlite:///{tmp_path}/{name}.db", tmp_path / "a"))
        assert kept.read_bytes() != content, "it was not made anew"


@pytest.mark.parametrize(
    ("cache", "name"),
    [
        *(("warm", name) for name in ("y?b=8", "z%20q", "a b", "lr=1e-4", "ü#1")),
        ("fresh", "y?b=8 z%20q"),  # two seconds; test_places.py has each by itself
    ],
)
def test_a_folder_may_have_any_name(cache: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs that mean something in a URL too, while MLflow makes the tables and when they are copied."""
    if cache == "fresh":
        monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))
    url = sqlalchemy.URL.create("sqlite", database=str(tmp_path / name / "mlflow.db")).render_as_string()
    assert new_run(open_tracking(url, tmp_path / name / "artifacts"))
    assert (tmp_path / name / "mlflow.db").is_file()


def test_an_empty_database_that_is_held_is_not_there_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` has let it pass a moment ago."""
    monkeypatch.setattr("search.tracking.address.check", lambda uri: None)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Unavailable, match="database is locked"):
            open_tracking(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "a")
        other.execute("ROLLBACK")
    assert new_run(open_tracking(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "a"))


def test_tables_that_are_half_made_are_refused(empty_database: Path, tmp_path: Path) -> None:
    copy_database(empty_database, tmp_path / "mlflow.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("DELETE FROM alembic_version")
        database.execute("DROP TABLE webhooks")
        database.commit()
    with pytest.raises(StorageError, match=r"only some of MLflow's tables.*name another database"):
        open_tracking(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "a")


def garbage(folder: Path) -> str:
    (folder / "x.db").write_text("this is no database, " * 100)
    return f"sqlite:///{folder}/x.db"


def optunas(folder: Path) -> str:
    with sqlite3.connect(folder / "x.db") as connection:
        connection.execute("CREATE TABLE studies (id INTEGER)")
    connection.close()
    return f"sqlite:///{folder}/x.db"


def a_folder_as_database(folder: Path) -> str:
    return f"sqlite:///{folder}"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (lambda folder: str(folder / "mlruns"), "sqlite:///runs/mlflow.db"),
        (lambda folder: f"file://{folder}/mlruns", "no longer takes folders"),
        (
            lambda folder: "http://user:secret@127.0.0.1:9",
            r"no MLflow server answers at http://user:\*\*\*@127.0.0.1:9",
        ),
        (lambda folder: "http://[", "is not an address|no MLflow server"),
        (lambda folder: "postgresql://user:secret@127.0.0.1:9/mlflow", r"postgresql://user:\*\*\*@127.0.0.1:9/mlflow"),
        (lambda folder: "redis://user:secret@host/0", "'redis' is not supported"),
        (garbage, "file is not a database"),
        (a_folder_as_database, "unable to open database file"),
        (optunas, "Optuna's database"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_at_once(
    uri: Callable[[Path], str], message: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(StorageError, match=message) as told:
        open_tracking(uri(tmp_path), tmp_path / "artifacts")
    assert time.monotonic() - began < 15
    assert "secret" not in str(told.value)


def test_a_database_of_another_mlflow_says_how_to_upgrade(tracking: Tracking, tmp_path: Path) -> None:
    copy_database(tmp_path / "mlflow.db", tmp_path / "old.db")
    with sqlite3.connect(tmp_path / "old.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'bd07f7e963c5'")
    connection.close()
    with pytest.raises(StorageError, match="mlflow db upgrade sqlite:///"):
        open_tracking(f"sqlite:///{tmp_path}/old.db", tmp_path / "artifacts")


def test_a_password_is_not_shown() -> None:
    assert "secret" not in shown("postgresql://user:secret@host/db")
    assert "secret" not in shown("http://user:secret@host:port/nonsense")


# ---------------------------------------------------------------------- environment


def test_facts_of_this_machine() -> None:
    facts = env.environment()
    assert facts["pid"] == str(os.getpid())
    assert facts["version.optuna"].startswith("5.")
    assert facts["cpu"] and facts["platform"]
    assert all(isinstance(value, str) and value for value in facts.values())


def test_the_commit_is_this_checkouts_or_none(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    ours = tmp_path / "search" / "tracking" / "environment.py"
    ours.parent.mkdir(parents=True)
    ours.write_text("x = 1\n")
    (tmp_path / "other").write_text("someone else's repository\n")
    git("add", "other")
    git("commit", "-q", "-m", "other")
    env.git.cache_clear()
    assert env.git(tmp_path) == {}, "this file is not that repository's"
    git("add", "search")
    git("commit", "-q", "-m", "ours")
    env.git.cache_clear()
    assert env.git(tmp_path) == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": "false"}
    ours.write_text("x = 2\n")
    env.git.cache_clear()
    assert env.git(tmp_path)["git_dirty"] == "true"


def test_nothing_heavy_is_imported_for_the_facts() -> None:
    code = (
        "import sys; from search.tracking.environment import environment; environment(); "
        "print(sorted({'torch', 'mlflow', 'optuna', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
