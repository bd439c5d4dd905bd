"""`RunRecorder`: a sink for trainer events that turns them into metrics and tags, and writes them off the
training thread. Knows nothing of MLflow: what it writes to is a `RunStore` (`search.tracking.client.Tracking`)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from search.diagnosis import Finding
from search.errors import StorageError
from search.records import INTERRUPTED, LOST, PAUSED, epoch_record
from search.tracking import judgement
from search.tracking.gpu_metrics import GpuMetrics
from search.tracking.outbox import DataUsed, End, Outbox, Point, Status
from search.tracking.writer import RunStore, Writer
from trainer.events import (
    Diverged,
    EpochEnded,
    Event,
    MicroBatchReduced,
    NonFinite,
    OutOfMemory,
    RunStarted,
    StepEnded,
)

EXACT_POINTS = 640
"""Most points of `step/loss` and of `step/grad_norm`: in runs of up to this many steps each step is logged, in longer
ones means over windows."""
CHART_POINTS = 320
"""Most points of `step/grad_norm_max`. MLflow's charts draw 320 points sampled from a curve, so that a spike in a
longer one is lost; the maximum over windows, 320 at most, is drawn whole (mlflow#11444, measured on 3.17)."""
CLOSE_S = 10.0
"""Longest wait for a store that hangs when a run ends."""
RATE_POINTS = 80
"""Most points of `step/learning_rate`: schedules are smooth. All four together stay below 2,000 points a run."""


class Curve:
    """One step metric, reduced over windows that end at multiples of `width` steps, or where an epoch ends.

    The windows depend on nothing but the step, so that a resumed run continues them.
    """

    def __init__(
        self, key: str, read: Callable[[StepEnded], float], reduce: Callable[[list[float]], float], width: int
    ) -> None:
        self.key, self.width = key, width
        self._read, self._reduce = read, reduce
        self._values: list[float] = []
        self._step = 0

    def add(self, event: StepEnded) -> tuple[str, float, int] | None:
        """(key, value, step) if the step completes a window. Values that are not finite do not count."""
        value = self._read(event)
        if math.isfinite(value):
            self._values.append(value)
        self._step = event.step
        return self.end() if event.step % self.width == 0 else None

    def end(self) -> tuple[str, float, int] | None:
        """(key, value, step) of the window so far, if it holds anything."""
        values, self._values = self._values, []
        return (self.key, self._reduce(values), self._step) if values else None


def step_curves(total_steps: int) -> tuple[Curve, ...]:
    """The curves of a run of `total_steps` steps, 2,000 points at most in all (and a few where epochs cut windows)."""

    def width(points: int) -> int:
        return max(1, math.ceil(total_steps / points))

    exact = width(EXACT_POINTS)
    curves = [
        Curve("step/loss", lambda e: e.loss, statistics.fmean, exact),
        Curve("step/grad_norm", lambda e: e.grad_norm, statistics.fmean, exact),
        Curve("step/learning_rate", lambda e: e.learning_rate, lambda values: values[-1], width(RATE_POINTS)),
    ]
    if total_steps > CHART_POINTS:  # otherwise the same as step/grad_norm, which is drawn whole
        curves.append(Curve("step/grad_norm_max", lambda e: e.grad_norm, max, width(CHART_POINTS)))
    return tuple(curves)


def run_status(state: str, reason: str | None = None) -> Status:
    """MLflow's status for an Optuna trial state.

    COMPLETE and PRUNED are both FINISHED: a pruned trial is the search working as meant, and the tag `state`
    tells them apart. FAIL is FAILED, or KILLED where someone or something from outside ended it.
    """
    if state in ("COMPLETE", "PRUNED"):
        return "FINISHED"
    return "KILLED" if reason in (INTERRUPTED, PAUSED, LOST) else "FAILED"


def run_facts(event: RunStarted) -> dict[str, str]:
    """Tags of what is known at the start of a run."""
    facts: dict[str, object] = {
        "data_fingerprint": event.data_fingerprint,
        "model_fingerprint": event.model_fingerprint,
        "device": event.device,
        "num_threads": event.num_threads,
        "num_train_samples": event.num_train_samples,
        "num_val_samples": event.num_val_samples,
        "steps_per_epoch": event.steps_per_epoch,
        "total_steps": event.total_steps,
        "trainable_parameters": event.trainable_parameters,
        "num_adapted_modules": len(event.adapted_modules),
        "num_skipped_rows": len(event.skipped_rows),
        "step_window": step_curves(event.total_steps)[0].width,
    }
    if event.resumed_from_epoch:
        facts["resumed_from_epoch"] = event.resumed_from_epoch
    return {**{key: str(value) for key, value in facts.items()}, **event.split}


def _data(event: RunStarted) -> list[DataUsed]:
    if not event.data:
        return []
    sizes = {"num_train": str(event.num_train_samples), "num_val": str(event.num_val_samples)}
    name = event.data.rstrip("/").rpartition("/")[2]
    profile = {**sizes, **event.split}
    return [DataUsed(name=name, digest=event.data_fingerprint, source=event.data, profile=profile)]


@dataclass(frozen=True, kw_only=True)
class Logged:
    """What a run already has, so that a resumed run doubles nothing."""

    steps: Mapping[str, int] = field(default_factory=dict)
    """Last step (or epoch) of each metric."""
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def last_epoch(self) -> int:
        """Last epoch whose metrics are recorded, 0 for none."""
        return self.steps.get("epoch_seconds", 0)


class RunRecorder:
    """Records one run. Call it with each event, then `finish` it, on every way out.

    Events of epochs and steps that are already recorded are left out: a resumed run may be given its
    checkpoint's history again, which fills what was lost if the process was killed before it was written.

    With an outbox nothing waits for a store that is away, and nothing is lost because of it: see `writer.Writer`.
    """

    def __init__(
        self,
        store: RunStore | None,
        run_id: str,
        logged: Logged | None = None,
        *,
        outbox: Outbox | None = None,
        flush_s: float = 10.0,
        close_s: float = CLOSE_S,
    ) -> None:
        self.run_id = run_id
        self.gpus: GpuMetrics | None = None
        """What the GPUs do meanwhile, if they are watched."""
        self.logged = logged or Logged()
        self._close_s = close_s
        self._curves = step_curves(0)
        self._bad_steps: dict[int, int] = {}
        """Steps of each epoch that were not finite. Not what the run's tag says: an epoch that an interruption cut
        short is trained again, and whole ones come again with the checkpoint's history."""
        self._first_seen = {key for key in self.logged.tags if key.startswith("nonfinite.")}
        self._last_ms = 0
        self._finished = False
        self.writer = Writer(store, run_id, flush_s, outbox)
        self.writer.start()

    @property
    def problem(self) -> str | None:
        """Why the latest write went to the outbox or was refused, None while all is well."""
        return self.writer.problem

    @property
    def finished(self) -> bool:
        """Whether the run has been ended."""
        return self._finished

    def __call__(self, event: Event) -> None:
        """Take one event. Costs some microseconds: writing is another thread's work."""
        match event:
            case StepEnded():
                self._step(event)
            case EpochEnded():
                self._epoch(event)
            case RunStarted():
                self._curves = step_curves(event.total_steps)
                texts = {"adapted_modules.txt": "\n".join(event.adapted_modules) + "\n"}
                if event.skipped_rows:
                    texts["skipped_rows.txt"] = "\n".join(event.skipped_rows) + "\n"
                self.writer.put(tags=run_facts(event), texts=texts, others=_data(event), now=True)
            case MicroBatchReduced():
                tags = {
                    "micro_batch_size": str(event.micro_batch_size),
                    "micro_batch_reduced_at_step": str(event.step),
                }
                self.writer.put(tags=tags)
            case OutOfMemory():
                self.writer.put(tags={"out_of_memory.step": str(event.step), "out_of_memory.detail": event.detail})
            case Diverged():
                self._nonfinite(event.first_bad_step, event.cause)
                self.writer.put(tags={"diverged.step": str(event.step)})

    def put_metric(self, key: str, value: float, step: int) -> None:
        """One more metric, known at the end of a run. Must be finite."""
        self._put([(key, value, step)])

    def finish(
        self,
        status: Status,
        *,
        state: str,
        reason: str | None = None,
        findings: Sequence[Finding] = (),
        tags: Mapping[str, str] | None = None,
        description: str = "",
    ) -> None:
        """Write what is left and end the run. The second call does nothing.

        Args:
            status: MLflow's status, see `run_status`.
            state: Optuna's state of the trial.
            reason: Why it ended, one of `search.records`' reasons.
            findings: The most severe first; they become tags, see `judgement.tags`.
            tags: Further tags.
            description: Markdown, shown on the run's page.

        Raises:
            StorageError: something could be written neither to the store nor to the outbox; the message says how
                much and why.
        """
        if self._finished:
            return
        self._finished = True
        self._put(curve.end() for curve in self._curves)
        final = {"state": state, **(tags or {}), **judgement.tags(findings)}
        if reason:
            final["reason"] = reason
        if self.writer.lost:
            final["tracking_lost"] = str(self.writer.lost)
        now_ms = time.time_ns() // 1_000_000
        end = End(status=status, tags=final, description=description, end_ms=now_ms)
        lost = self.writer.close(end, self._close_s)
        if lost:
            why = self.writer.problem
            raise StorageError(f"run {self.run_id}: {lost} metrics and tags could not be recorded: {why}")

    def _step(self, event: StepEnded) -> None:
        self._put(curve.add(event) for curve in self._curves)
        if self.gpus is not None:
            self._put((key, value, event.step) for key, value in self.gpus.due().items())
        if event.nonfinite is not None:
            self._bad_steps[event.epoch] = self._bad_steps.get(event.epoch, 0) + 1
            self._nonfinite(event.step, event.nonfinite)

    def _epoch(self, event: EpochEnded) -> None:
        self._put(curve.end() for curve in self._curves)
        metrics = {key: value for key, value in vars(epoch_record(event)).items() if key != "epoch"}
        self._put((key, value, event.epoch) for key, value in metrics.items() if math.isfinite(value))
        bad = [key for key, value in metrics.items() if not math.isfinite(value)]
        tags = self._first({f"nonfinite.{key}": f"epoch {event.epoch}" for key in bad})
        if event.nonfinite_steps:
            self._bad_steps[event.epoch] = event.nonfinite_steps
            tags |= self._bad_steps_tag()
        self.writer.put(tags=tags, now=True)

    def _nonfinite(self, step: int, what: NonFinite) -> None:
        first = {
            "nonfinite.step": str(step),
            "nonfinite.tensor": what.tensor,
            "nonfinite.value": what.value,
            "nonfinite.after_update": str(what.after_update).lower(),
            "nonfinite.detail": what.detail,
        }
        self.writer.put(tags=self._bad_steps_tag() | self._first(first))

    def _bad_steps_tag(self) -> dict[str, str]:
        return {"nonfinite.steps": str(sum(self._bad_steps.values()))}

    def _first(self, tags: Mapping[str, str]) -> dict[str, str]:
        """The tags that were not set before: what went bad first is what explains the rest."""
        new = {key: value for key, value in tags.items() if key not in self._first_seen}
        self._first_seen.update(new)
        return new

    def _put(self, values: Iterable[tuple[str, float, int] | None]) -> None:
        """Queue (key, value, step) that are not yet recorded, under a clock that never runs backwards."""
        self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
        points = [
            Point(key, value, step, self._last_ms)
            for key, value, step in (v for v in values if v is not None)
            if step > self.logged.steps.get(key, 0)
        ]
        if points:
            self.writer.put(points)
