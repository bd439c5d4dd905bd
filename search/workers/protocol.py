"""What a worker process tells its supervisor, and what it is told: small picklable values over one pipe each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Order(IntEnum):
    """What the supervisor wants of a worker; a higher one overrides a lower one."""

    GO_ON = 0
    END_AFTER_EPOCH = 1
    """Finish the current epoch, save, set the trial back to waiting, and end."""
    END_NOW = 2
    """The same at the next step; the epoch in progress is lost."""


@dataclass(frozen=True)
class HandOver:
    """Asked of a worker with several trials: hand half of them over, each after its epoch, to a worker without any."""


@dataclass(frozen=True)
class Idle:
    """The worker has nothing to train, and the study no trial for it; another worker may hand some of its own over."""


@dataclass(frozen=True)
class Alive:
    """Work goes on, in a stretch that has nothing else to tell: a long step or evaluation."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The worker is loading its base model."""

    what: str


@dataclass(frozen=True, kw_only=True)
class SlotsChosen:
    """How many trials the worker trains at once."""

    most: int
    samples: float
    """Samples in a pass from which no further trial is taken in."""
    auto: bool


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A trial began, or goes on."""

    number: int
    config: dict[str, Any]
    label: str | None
    resumed_from_epoch: int


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """Now and then while a trial trains."""

    number: int
    step: int
    total_steps: int
    epoch: int
    loss: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """An epoch was reported."""

    number: int
    epoch: int
    train_loss: float
    val_loss: float
    learning_rate: float
    epoch_s: float
    from_checkpoint: bool


@dataclass(frozen=True, kw_only=True)
class TrialEnded:
    """A trial reached a final state, or waits to go on."""

    number: int
    state: str
    reason: str
    detail: str
    value: float | None
    findings: tuple[str, ...]
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something the user should know."""

    text: str


@dataclass(frozen=True, kw_only=True)
class WorkerFailed:
    """The worker cannot go on. `user` tells a mistake of the user's from a fault of ours."""

    text: str
    user: bool


Message = (
    Alive | Idle | Loading | SlotsChosen | TrialStarted | StepDone | EpochDone | TrialEnded | Notice | WorkerFailed
)
