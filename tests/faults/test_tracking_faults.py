"""MLflow down, slow, wrong or locked: training goes on, and in the end every record is there once, in its order."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.tracking import MlflowClient

from search.errors import StorageError, Unavailable
from search.places import Places
from search.tracking import delivery as module
from search.tracking.client import Tracking, open_tracking
from search.tracking.delivery import Delivery, DeliveryThread
from search.tracking.outbox import End, Point, Write, is_local
from search.tracking.runs import StudyRuns
from tests.search.tracking.recorded import copy_database, finding, whole_run
from trainer.config import TrainConfig

SAME = {"pid", "process_started", "record_id", "mlflow.parentRunId", "resumed_from_epoch"}
"""Tags that differ between two recordings of the same."""


class Killed(BaseException):
    """The process gets no further."""


class Flaky:
    """MLflow's client, of which calls fail, or kill their process, when told to: before they are made, or after."""

    def __init__(self, client: MlflowClient, fail: Callable[[], str]) -> None:
        self._client, self._fail = client, fail
        self.calls = self.failures = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            how = self._fail()
            result = None if how.endswith("before") else method(*arguments, **options)
            if how.startswith("killed"):
                raise Killed
            if how in ("before", "after"):
                self.failures += 1
                raise MlflowException("the server is away", error_code=TEMPORARILY_UNAVAILABLE)
            return result

        return call


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    open_tracking(f"sqlite:///{folder}/mlflow.db", folder / "artifacts")
    return folder / "mlflow.db"


class Place:
    """A folder with MLflow's database and a study's outbox, as one process after another finds it."""

    def __init__(self, folder: Path, empty: Path) -> None:
        folder.mkdir(exist_ok=True)
        copy_database(empty, folder / "mlflow.db")
        self.folder = folder
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.fail: Callable[[], str] = lambda: ""

    def runs(self) -> StudyRuns:
        """A process' own. Its store fails as `fail` says at the time."""
        runs = StudyRuns(Places.of(self.folder, tracking=self.uri), "demo")
        opened: list[Tracking] = []

        def connect() -> Tracking:
            if not opened:
                tracking = open_tracking(self.uri, self.folder / "artifacts")
                tracking._client = Flaky(tracking._client, lambda: self.fail())  # type: ignore[assignment]
                opened.append(tracking)
            return opened[0]

        runs.connect = connect  # type: ignore[method-assign]
        return runs


@pytest.fixture
def place(tmp_path: Path, empty: Path) -> Place:
    return Place(tmp_path / "flaky", empty)


def deliver(place: Place, rounds: int = 400) -> None:
    """Deliver all, every tenth round by another process that begins again, as after one that was killed."""
    begins = True
    for number in range(rounds):
        if begins:
            runs = place.runs()
            delivery = Delivery(runs.outbox, "demo", runs.connect)
        begins = number % 10 == 9
        try:
            delivery.once()
        except StorageError:
            pass
        except Killed:
            delivery.close()  # the kernel takes a lock back
            begins = True
            continue
        if not runs.outbox.runs():
            return
        if begins:
            delivery.close()
    raise AssertionError(f"still there: {place.runs().outbox.runs()}")


def content(uri: str) -> dict[str, Any]:
    """All that MLflow has of the study by run, with every point that was ever written, but ids and times."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    found: dict[str, Any] = {}
    for run in client.search_runs([experiment.experiment_id], run_view_type=ViewType.ACTIVE_ONLY):
        assert run.info.run_name not in found, f"{run.info.run_name} is there twice"
        history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        for key, metrics in history.items():
            times = [m.timestamp for m in metrics]
            assert times == sorted(times), f"{key} is out of order"
        found[run.info.run_name] = {
            "status": run.info.status,
            "params": run.data.params,
            "tags": {k: v for k, v in run.data.tags.items() if k not in SAME},
            "metrics": {key: [(m.step, m.value) for m in metrics] for key, metrics in history.items()},
            "files": sorted(f.path for f in client.list_artifacts(run.info.run_id)),
            "ended": run.info.end_time is not None,
        }
    return found


def search(runs: StudyRuns, restart: Callable[[], StudyRuns]) -> None:
    """What a search records: three trials, of which the second is interrupted and goes on in another process."""
    events = whole_run(3, 20)
    second_epoch = events.index(next(e for e in events if getattr(e, "epoch", 0) == 2 and not hasattr(e, "loss")))
    runs.start_study({"data_fingerprint": "d"})
    log = runs.outbox.folder.parent / "tuning-log.md"
    for number in range(3):
        tags = {"trial": str(number)}
        recorder = runs.begin(f"trial {number}", TrainConfig().model_dump(), tags)
        stop = second_epoch - 7 if number == 1 else len(events)  # in the middle of the second epoch
        for event in events[:stop]:
            recorder(event)
            if hasattr(event, "train_loss"):
                recorder.writer.put(now=True)
                time.sleep(0.02)
        if number == 1:
            recorder.finish(
                "KILLED", state="WAITING", reason="interrupted", findings=[finding("too_slow")], tags={"detail": "x"}
            )
            runs = restart()
            runs.start_study({"data_fingerprint": "d"})
            recorder = runs.resume(recorder.run_id)
            first_epoch = events.index(next(e for e in events if hasattr(e, "train_loss")))
            for event in [events[first_epoch], events[0], *events[first_epoch + 1 :]]:
                recorder(event)  # the checkpoint's history, then the rest again
        recorder.put_metric("best_val_loss", 1.5, 1)
        recorder.finish(
            "FINISHED", state="COMPLETE", reason="finished", findings=[finding("healthy")], description="# How"
        )
    log.parent.mkdir(exist_ok=True)
    log.write_text("the log")
    runs.keep(log)
    runs.end_study("FINISHED", {"summary": "3 trials"})


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, empty: Path) -> dict[str, Any]:
    """What an undisturbed search leaves."""
    place = Place(tmp_path_factory.mktemp("calm"), empty)
    search(place.runs(), place.runs)
    assert place.runs().outbox.runs() == []
    found = content(place.uri)
    assert set(found) == {"demo", "trial 0", "trial 1", "trial 2"}
    assert [step for step, _ in found["trial 1"]["metrics"]["step/loss"]] == list(range(1, 61))
    assert "finding.too_slow" not in found["trial 1"]["tags"]
    return found


@pytest.mark.parametrize("seed", [0, *(pytest.param(more, marks=pytest.mark.slow) for more in (1, 2))])
def test_calls_that_fail_at_random_before_or_after_they_are_made(
    seed: int, place: Place, expected: dict[str, Any]
) -> None:
    chance = random.Random(seed)

    def fail() -> str:
        return chance.choice(("before", "after", *[""] * 8))

    place.fail = fail
    search(place.runs(), place.runs)
    deliver(place)
    assert content(place.uri) == expected
    assert not [*place.runs().outbox.folder.glob("*.rejected")]


@pytest.mark.long
def test_processes_that_are_killed_while_they_deliver(place: Place, expected: dict[str, Any]) -> None:
    """Before or after a call is made, between calls that fail: the next one goes on."""
    place.fail = lambda: "before"
    search(place.runs(), place.runs)
    chance = random.Random(0)
    kills = 0

    def fail() -> str:
        nonlocal kills
        how = chance.choice(("killed before", "killed after", "before", "after", *[""] * 16))
        kills += how.startswith("killed")
        return how

    place.fail = fail
    deliver(place)
    assert kills > 3
    assert content(place.uri) == expected
    assert not [*place.runs().outbox.folder.glob("*.rejected")]


def test_away_from_start_to_end(place: Place, expected: dict[str, Any]) -> None:
    place.fail = lambda: "before"
    runs = place.runs()
    began = time.monotonic()
    search(runs, place.runs)
    assert time.monotonic() - began < 10
    assert all(is_local(run_id) or run_id == "study" for run_id in runs.outbox.runs()) and len(runs.outbox.runs()) == 4
    place.fail = lambda: ""
    deliver(place)
    assert content(place.uri) == expected


@pytest.mark.parametrize(("since", "until"), [(5, 30), (0, 12), (20, 10_000)])
def test_away_for_a_while(since: int, until: int, place: Place, expected: dict[str, Any]) -> None:
    """At the start, in the middle, and to the end, by the number of the call."""
    calls = iter(range(10_000_000))
    place.fail = lambda: "before" if since <= next(calls) < until else ""
    search(place.runs(), place.runs)
    place.fail = lambda: ""
    deliver(place)
    assert content(place.uri) == expected


@pytest.mark.long
def test_a_trial_that_goes_on_while_any_one_call_of_the_delivery_fails(place: Place) -> None:
    """It began while MLflow was away, and its file is delivered and begun anew while it trains."""
    runs = place.runs()
    runs.connect()  # opening it takes no call that may fail
    number, failed = -1, True
    while failed:
        number += 1
        calls, failed = iter(range(10_000)), False

        def fail(number: int = number, calls: Iterator[int] = calls) -> str:
            nonlocal failed
            if next(calls) != number:
                return ""
            failed = True
            return "before"

        place.fail = lambda: "before"
        recorded = runs.begin(f"trial {number}", {"note": "x" * 400}, {}).run_id
        delivery = Delivery(runs.outbox, "demo", runs.connect)
        place.fail = fail
        records = 0
        for epoch in (1, 2, 3):
            # The file of epoch 3 is longer than that of the beginning was.
            tags = {f"note.{row}": "x" * 400 for row in range(12 if epoch == 3 else 0)}
            runs.outbox.append(recorded, [Write(points=[Point("val_loss", 1 / epoch, epoch, epoch)], tags=tags)])
            with contextlib.suppress(StorageError):
                records += delivery.once().records
        runs.outbox.append(recorded, [End(status="FINISHED", tags={}, description="", end_ms=5)])
        for _ in range(2):
            with contextlib.suppress(StorageError):
                records += delivery.once().records
        assert runs.outbox.runs() == [] and records == 1 + 3 + 12 + 1
        with runs.outbox.delivering() as free:
            assert free, "another command may deliver"
    assert number > 20, "every call failed once"
    found = content(place.uri)
    for which in range(number + 1):
        run = found[f"trial {which}"]
        assert [step for step, _ in run["metrics"]["val_loss"]] == [1, 2, 3], f"call {which} failed"
        assert run["status"] == "FINISHED"
    assert not [*runs.outbox.folder.glob("*.rejected")]


def test_what_was_refused_is_told_although_the_round_fails_later(place: Place) -> None:
    place.fail = lambda: "before"
    runs = place.runs()
    runs.end("0" * 32, "FAILED", {"state": "FAIL"})
    time.sleep(0.02)  # the outbox is delivered by the files' times
    runs.begin("trial 0", {}, {})
    delivery = Delivery(runs.outbox, "demo", runs.connect)
    place.fail = lambda: "before" if not runs.outbox.holds("0" * 32) else ""
    with pytest.raises(Unavailable):
        delivery.once()
    place.fail = lambda: ""
    done = delivery.once()
    assert done.runs == 2 and len(done.rejected) == 1 and "0" * 32 in done.rejected[0]


def test_records_that_somebody_deleted_hold_no_lock(place: Place) -> None:
    place.fail = lambda: "before"
    runs = place.runs()
    run_id = runs.begin("trial 0", {}, {}).run_id
    delivery = Delivery(runs.outbox, "demo", runs.connect)
    with pytest.raises(Unavailable):
        delivery.once()
    (runs.outbox.folder / f"{run_id}.jsonl").unlink()
    assert delivery.once() == (0, 0, (), False)
    with runs.outbox.delivering() as free:
        assert free


def test_the_user_is_told_once_and_when_it_is_back(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.05)
    place.fail = lambda: "before"
    runs = place.runs()
    said: list[str] = []
    thread = DeliveryThread(Delivery(runs.outbox, "demo", runs.connect), "http://mlflow", said.append)
    thread.start()
    runs.begin("trial 0", {}, {}).finish("FINISHED", state="COMPLETE")
    time.sleep(0.8)
    assert len(said) == 1 and "MLflow (http://mlflow) does not take records now" in said[0]
    assert "the server is away" in said[0] and str(runs.outbox.folder) in said[0]
    place.fail = lambda: ""
    deadline = time.monotonic() + 20
    while len(said) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert said[1].startswith("MLflow answers again after") and thread.close() is None
    assert content(place.uri)["trial 0"]["status"] == "FINISHED"


def test_what_is_left_at_the_end_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FINAL_S", 0.1)
    place.fail = lambda: "before"
    runs = place.runs()
    runs.begin("trial 0", {}, {}).finish("FINISHED", state="COMPLETE")
    thread = DeliveryThread(Delivery(runs.outbox, "demo", runs.connect), "http://mlflow", lambda _: None)
    left = thread.close()
    assert left is not None and left.startswith("records of 1 runs are not delivered yet") and "away" in left


def test_a_run_that_is_refused_does_not_hold_up_the_others(place: Place) -> None:
    place.fail = lambda: "before"
    runs = place.runs()
    gone = runs.begin("trial 0", {}, {})
    place.fail = lambda: ""
    gone.finish("FINISHED", state="COMPLETE")
    runs.end("0" * 32, "FAILED", {"state": "FAIL"})
    runs.begin("trial 1", {}, {}).finish("FINISHED", state="COMPLETE")
    done = Delivery(runs.outbox, "demo", runs.connect).once()
    assert done.runs == 3 and len(done.rejected) == 1 and "0" * 32 in done.rejected[0]
    assert (runs.outbox.folder / f"{'0' * 32}.rejected").is_file()
    assert {"trial 0", "trial 1"} <= content(place.uri).keys()


def test_a_locked_sqlite_database(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process holds MLflow's file: what is recorded meanwhile comes after."""
    runs = StudyRuns(Places.of(place.folder, tracking=place.uri), "demo")
    recorder = runs.begin("trial 0", TrainConfig().model_dump(), {})
    assert not is_local(recorder.run_id)
    recorder._close_s = 0.5
    other = sqlite3.connect(place.folder / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for event in whole_run(2, 20):
        recorder(event)
    began = time.monotonic()
    recorder.finish("FINISHED", state="COMPLETE", reason="finished")
    assert time.monotonic() - began < 5
    assert runs.outbox.runs() == [recorder.run_id]
    other.execute("ROLLBACK")
    other.close()
    recorder.writer.join()
    deliver(place)
    run = content(place.uri)["trial 0"]
    assert run["status"] == "FINISHED" and run["tags"]["reason"] == "finished"
    assert [step for step, _ in run["metrics"]["step/loss"]] == list(range(1, 41))


def test_an_address_that_nobody_has_is_refused_and_one_that_is_silent_is_not(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as refused:
        StudyRuns(Places.of(tmp_path, tracking="http://no-such-host.invalid:5000"), "demo").start_study({})
    assert not isinstance(refused.value, Unavailable)
    why = StudyRuns(Places.of(tmp_path, tracking="http://127.0.0.1:9"), "demo").start_study({})
    assert why is not None and "no MLflow server answers" in why
