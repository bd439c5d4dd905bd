"""Recording a run: what is written, and what survives failures of the store."""

import math
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from search import records
from search.errors import StorageError, Unavailable
from search.tracking.outbox import End, Outbox, Write
from search.tracking.recorder import Logged, RunRecorder
from search.tracking.writer import send
from tests.search.tracking.recorded import BAD, Store, epoch, finding, record, started, step, whole_run
from trainer.events import (
    Diverged,
    EpochEnded,
    Event,
    MicroBatchReduced,
    OutOfMemory,
    StepEnded,
)

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
    recorder.finish(
        "FINISHED", state="PRUNED", reason="rising", findings=[finding("overfitting"), finding("oscillating")]
    )
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


@pytest.mark.parametrize("known", [True, False], ids=["resumed in MLflow", "resumed in the outbox"])
def test_a_resumed_run_counts_each_step_that_was_not_finite_once(known: bool) -> None:
    """In the outbox nothing is known of what the run has; the delivery leaves the first bad step's tags alone."""
    bad = {7, 12, 13}
    events: list[Event] = []
    for event in whole_run(3, 10):
        if isinstance(event, StepEnded) and event.step in bad:
            event = replace(event, loss=math.nan, nonfinite=BAD)
        elif isinstance(event, EpochEnded):
            event = replace(event, nonfinite_steps=[1, 2, 0][event.epoch - 1])
        events.append(event)
    assert record(events).tags["nonfinite.steps"] == "3"
    store = record(events[:15])  # interrupted in the second epoch, after its bad steps
    assert store.tags["nonfinite.steps"] == "3"
    logged = Logged(tags=dict(store.tags)) if known else None
    first = events.index(next(e for e in events if isinstance(e, EpochEnded)))
    record([events[first], events[0], *events[first + 1 :]], store, logged)
    assert store.tags["nonfinite.steps"] == "3"


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
