"""Events of a run that never trained, a store in memory that takes them, and a run in MLflow."""

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from search.diagnosis import Finding
from search.tracking.client import Tracking
from search.tracking.outbox import Point, Status
from search.tracking.recorder import Logged, RunRecorder
from tests.support import made_up_events
from trainer.config import TrainConfig
from trainer.events import (
    EpochEnded,
    EpochTiming,
    Event,
    NonFinite,
    RunStarted,
    StepEnded,
    StepTiming,
)

BAD = NonFinite(tensor="grad: q.lora_A", value="nan", after_update=False, detail="float16, eps rounds to 0")


def finding(name: str) -> Finding:
    """One that says nothing: of its id alone there are tags."""
    return Finding(id=name, kind="any", severity="info", cause="any")


def started(total_steps: int, epochs: int = 2) -> RunStarted:
    return replace(
        made_up_events.started(total_steps),
        num_train_samples=160,
        num_val_samples=40,
        steps_per_epoch=total_steps // epochs,
        warmup_steps=10,
        trainable_parameters=1234,
        adapted_modules=("qformer.a", "qformer.b"),
        skipped_rows=(),
        data_fingerprint="d" * 16,
        model_fingerprint="m" * 16,
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
    return replace(
        made_up_events.epoch(number, val_loss),
        step=last_step,
        train_loss=2.0 / number,
        learning_rate=1e-4,
        grad_norm_mean=0.5,
        grad_norm_max=0.9,
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


def copy_database(source: Path, target: Path) -> None:
    """A copy by SQLite itself: what lies in the write-ahead log is part of it."""
    with contextlib.closing(sqlite3.connect(source)) as old, contextlib.closing(sqlite3.connect(target)) as new:
        old.backup(new)


def new_run(tracking: Tracking, study: str = "demo", name: str = "trial 0", **tags: str) -> str:
    experiment = tracking.experiment(study)
    parent = tracking.parent_run(study, {})
    return tracking.start_run(experiment, parent, name=name, config=TrainConfig().model_dump(), tags=tags)
