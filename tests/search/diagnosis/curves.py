"""Curves to diagnose, as losses or as events, and what was found in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from search.diagnosis import (
    Curve,
    Finding,
    NonFiniteFacts,
    diagnose,
)
from search.records import EpochRecord
from tests.support import made_up_events
from trainer.events import (
    EpochEnded,
    EpochTiming,
    NonFinite,
    RunStarted,
    StepEnded,
    StepTiming,
)

Losses = Sequence[float | None]


def curve(train: Losses, val: Losses = (), *, rate: float = 2e-4, epochs: Sequence[int] = (), **more: Any) -> Curve:
    """A curve of these losses; the configuration is the log's experiment 4 unless `config` says otherwise."""
    numbers = epochs or range(1, len(train) + 1)
    values = [*val, *[None] * (len(train) - len(val))]
    config = {"learning_rate": rate, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "num_epochs": len(train)}
    config |= more.pop("config", {})
    rows = zip(numbers, train, values, strict=True)
    return Curve(
        config=config, epochs=tuple(EpochRecord(epoch=e, train_loss=t, val_loss=v) for e, t, v in rows), **more
    )


def ids(found: Curve) -> list[str]:
    return [finding.id for finding in diagnose(found)]


def only(found: Curve) -> Finding:
    (finding,) = diagnose(found)
    return finding


def moves(finding: Finding) -> list[tuple[str, Any, Any]]:
    return [(a.parameter, a.before, a.after) for a in finding.advice]


FALLING = [1.9, 1.7, 1.62, 1.58, 1.56, 1.55, 1.545, 1.54]
FALLING_VAL = [1.7, 1.58, 1.53, 1.50, 1.49, 1.485, 1.483, 1.482]


def step(number: int, loss: float, nonfinite: NonFinite | None = None, norm: float = 0.5) -> StepEnded:
    return StepEnded(
        step=number,
        epoch=1,
        loss=loss,
        grad_norm=norm,
        learning_rate=5e-6,
        num_samples=2,
        num_tokens=100,
        nonfinite=nonfinite,
        timing=StepTiming(step_s=1.0, data_wait_s=0.1),
    )


def started() -> RunStarted:
    return replace(
        made_up_events.started(30, modules=1),
        num_train_samples=80,
        num_val_samples=20,
        steps_per_epoch=10,
        warmup_steps=200,
        skipped_rows=(),
    )


def ended(epoch: int, train: float, val: float) -> EpochEnded:
    timing = EpochTiming(
        epoch_s=100, train_s=80, data_wait_s=40, eval_s=15, checkpoint_s=5, samples_per_s=1, peak_memory_gib=1
    )
    return replace(
        made_up_events.epoch(epoch, val),
        step=10 * epoch,
        train_loss=train,
        learning_rate=1e-4,
        grad_norm_mean=0.5,
        grad_norm_max=0.9,
        timing=timing,
    )


FACTS = NonFiniteFacts(
    step=2,
    epoch=1,
    tensor="param: a.lora_A.weight",
    value="nan",
    after_update=True,
    measured="the gradient there was exactly 0",
    bad_steps=3,
    ended=True,
    last_finite_step=1,
    last_finite_loss=2.38,
)
