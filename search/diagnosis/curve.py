"""`Curve`, what the diagnosis reads, made from a run's events or a trial's records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from search import records
from search.diagnosis.finding import NON_FINITE
from search.diagnosis.noise import VAL_NOISE, train_noise, usable
from search.records import EpochRecord, StepRecord, TrialRecord, epoch_record
from trainer.config import TrainConfig
from trainer.events import Diverged, EpochEnded, Event, NonFinite, OutOfMemory, RunStarted, StepEnded

SLOW_EPOCH_S = 600.0
"""An epoch longer than this is slow. The hand-run log found 20 minutes too slow and was content with its target of
10."""


@dataclass(frozen=True, kw_only=True)
class NonFiniteFacts:
    """The first tensor of a run that was not finite, and the steps around it."""

    step: int
    epoch: int | None
    tensor: str
    value: str
    after_update: bool
    measured: str
    """The trainer's own words for what it measured (`trainer.events.NonFinite.detail`)."""
    bad_steps: int
    """Total number of steps that were not finite."""
    ended: bool
    """Whether it ended the run."""
    last_finite_step: int | None
    last_finite_loss: float | None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run as far as it is known; unknown values are None or empty."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """Values of TrainConfig."""
    epochs: tuple[EpochRecord, ...] = ()
    """Losses may be NaN or infinite where that was seen; None means not recorded. `data_wait_fraction` is a share of
    the training time."""
    steps: tuple[StepRecord, ...] = ()
    nonfinite: NonFiniteFacts | None = None
    reason: str | None = None
    """Why the run ended, one of `search.records`' reasons."""
    detail: str | None = None
    """The reason in words."""
    num_samples: int | None = None
    """Training and validation samples together."""
    total_steps: int | None = None
    """Planned optimizer steps, whether the run got that far or not."""
    peer_seconds_per_sample: float | None = None
    """Seconds per sample of comparable runs: the same model on the same machine."""
    slow_epoch_s: float = SLOW_EPOCH_S
    val_noise: float = VAL_NOISE
    """Standard deviation of an epoch's validation loss, a share of the loss; a study gives its own."""

    def number(self, name: str) -> float | None:
        """A configuration value if it is a usable number, else None."""
        value = self.config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return value if usable(value) else None

    @property
    def train_noise(self) -> float:
        """Standard deviation of an epoch's training loss, a share of the loss."""
        return train_noise(self.num_samples or self.number("max_samples"))

    @property
    def last_epoch(self) -> int:
        return max((record.epoch for record in self.epochs), default=0)

    @property
    def peak_rate(self) -> float | None:
        """The highest learning rate reached: that of the steps where they are known, else the configured one.

        An epoch's rate is that of its last step, which misses the peak of a schedule that falls.
        """
        steps, epochs = (
            [r.learning_rate for r in rows if usable(r.learning_rate)] for rows in (self.steps, self.epochs)
        )
        configured = self.number("learning_rate")
        known = steps or ([configured] if configured is not None else epochs)
        return max((rate for rate in known if rate is not None), default=None)

    @property
    def planned_steps(self) -> tuple[int, str] | None:
        """(planned optimizer steps, their source: run, steps or configuration)."""
        if self.total_steps is not None:
            return self.total_steps, "run"
        epochs = self.number("num_epochs")
        if epochs is None or not 1 <= epochs < 1e9:
            return None
        last_step = max((record.step for record in self.steps), default=0)
        if last_step > 0 and self.last_epoch > 0 and self.reason in (records.FINISHED, records.RISING):
            return round(last_step / self.last_epoch * epochs), "steps"
        per_epoch = self._configured_steps()
        return None if per_epoch is None else (per_epoch * int(epochs), "configuration")

    def _configured_steps(self) -> int | None:
        """Optimizer steps per epoch by the configuration, for a run that left no facts."""
        samples, batch = self.number("max_samples"), self.number("batch_size")
        if samples is None or batch is None or samples < 2 or batch < 1:
            return None
        share = min(max(self.number("val_fraction") or 0.0, 0.0), 1.0)
        train = max(1, int(samples) - round(samples * share))
        accumulation = max(1.0, self.number("gradient_accumulation_steps") or 1.0)
        return math.ceil(math.ceil(train / batch) / accumulation)


def curve_from_events(config: TrainConfig, events: Iterable[Event], *, reason: str | None = None) -> Curve:
    """The curve of a run from its events in order."""
    curve = Curve(config=config.model_dump(mode="json"), reason=reason)
    epochs: list[EpochRecord] = []
    steps: list[StepEnded] = []
    ended: Diverged | None = None
    for event in events:
        if isinstance(event, RunStarted):
            samples = event.num_train_samples + event.num_val_samples
            curve = replace(curve, num_samples=samples, total_steps=event.total_steps)
        elif isinstance(event, StepEnded):
            steps.append(event)
        elif isinstance(event, EpochEnded):
            epochs.append(_epoch_record(event))
        elif isinstance(event, Diverged):
            ended = event
            curve = replace(curve, reason=reason or records.NON_FINITE)
        elif isinstance(event, OutOfMemory):
            curve = replace(curve, reason=reason or records.OUT_OF_MEMORY, detail=event.detail)
    step_records = tuple(
        StepRecord(step=s.step, loss=s.loss, grad_norm=s.grad_norm, learning_rate=s.learning_rate) for s in steps
    )
    return replace(curve, epochs=tuple(epochs), steps=step_records, nonfinite=_nonfinite(steps, ended))


def _epoch_record(event: EpochEnded) -> EpochRecord:
    record = epoch_record(event)
    if event.nonfinite_steps and not usable(event.train_loss):  # the steps say more: which was the first, and why
        record = replace(record, train_loss=None)
    return record


def _nonfinite(steps: list[StepEnded], ended: Diverged | None) -> NonFiniteFacts | None:
    """The first bad step; if a series of bad steps ended the run, the first of that series."""
    bad = [step for step in steps if step.nonfinite is not None]
    first: tuple[int, int, NonFinite] | None = None
    if ended is not None:
        epoch = next((s.epoch for s in bad if s.step == ended.first_bad_step), ended.epoch)
        first = (ended.first_bad_step, epoch, ended.cause)
    elif bad and bad[0].nonfinite is not None:
        first = (bad[0].step, bad[0].epoch, bad[0].nonfinite)
    if first is None:
        return None
    step, epoch, cause = first
    before = [s for s in steps if s.step < step and usable(s.loss)]
    return NonFiniteFacts(
        step=step,
        epoch=epoch,
        tensor=cause.tensor,
        value=cause.value,
        after_update=cause.after_update,
        measured=cause.detail,
        bad_steps=len(bad) or 1,
        ended=ended is not None,
        last_finite_step=before[-1].step if before else None,
        last_finite_loss=before[-1].loss if before else None,
    )


def curve_from_record(trial: TrialRecord, val_noise: float = VAL_NOISE) -> Curve:
    """The curve of a trial from its records.

    What only the events knew (which tensor went bad) comes from the findings recorded with the trial, if any.

    Args:
        trial: The trial.
        val_noise: Standard deviation of an epoch's validation loss, a share of the loss.
    """
    samples = [trial.tags.get(name, "") for name in ("num_train_samples", "num_val_samples")]
    total = trial.tags.get("total_steps", "")
    return Curve(
        num_samples=sum(map(int, samples)) if all(text.isdecimal() for text in samples) else None,
        total_steps=int(total) if total.isdecimal() else None,
        val_noise=val_noise,
        config=trial.config,
        epochs=trial.epochs,
        steps=trial.steps,
        nonfinite=_recorded_facts(trial.attrs.get(records.FINDINGS)),
        reason=trial.reason,
        detail=trial.detail,
    )


def _recorded_facts(findings: Any) -> NonFiniteFacts | None:
    for finding in findings if isinstance(findings, list | tuple) else ():
        evidence = finding.get("evidence", {}) if isinstance(finding, Mapping) else {}
        if evidence and finding.get("id") == NON_FINITE and set(_FACTS) <= set(evidence):
            return NonFiniteFacts(**{name: evidence[name] for name in _FACTS})
    return None


_FACTS = tuple(NonFiniteFacts.__dataclass_fields__)


def facts_as_evidence(facts: NonFiniteFacts) -> dict[str, Any]:
    """The facts under the names that `curve_from_record` reads."""
    return asdict(facts)
