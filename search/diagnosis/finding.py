"""`Finding` and `Advice`: what the diagnosis says about a run, as plain values.

A finding holds facts only. `search.diagnosis.messages` builds its sentences from them, in English or in Chinese, so
that both say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Severity = Literal["info", "warning", "error"]
Scalar = str | int | float | bool | None

NON_FINITE = "non_finite"
EXPLODING_GRADIENT = "exploding_gradient"
DIVERGED = "diverged"
OSCILLATING = "oscillating"
OVERFITTING = "overfitting"
NOT_LEARNING = "not_learning"
TOO_SLOW = "too_slow"
INCONCLUSIVE = "inconclusive"
"""Too few epochs to tell. Not in the hand-run log: two epochs would otherwise have to be guessed at."""
HEALTHY = "healthy"
WARMUP_EXCEEDS_TRAINING = "warmup_exceeds_training"
SLOW_EPOCH = "slow_epoch"

IDS = (
    NON_FINITE,
    EXPLODING_GRADIENT,
    DIVERGED,
    OSCILLATING,
    OVERFITTING,
    NOT_LEARNING,
    TOO_SLOW,
    INCONCLUSIVE,
    HEALTHY,
    WARMUP_EXCEEDS_TRAINING,
    SLOW_EPOCH,
)
"""Every id, in the order of findings: the log's order of work, stability first. The first eight and `healthy` judge
the curve, the last two the plan; a curve is `healthy` or has one of the others, never both."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One thing to change: `action` applied to a field of TrainConfig."""

    action: str
    """A key of `texts.ACTIONS`: raise, lower, set, ..."""
    parameter: str
    before: Scalar = None
    """The value now; None where the configuration does not say."""
    after: Scalar = None
    """The value to try; None where no particular value can be justified."""

    def to_dict(self) -> dict[str, Any]:
        return {"action": self.action, "parameter": self.parameter, "from": self.before, "to": self.after}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Advice:
        return cls(action=data["action"], parameter=data["parameter"], before=data["from"], after=data["to"])


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One statement about a run, with its evidence.

    Raises:
        ValueError: an id or severity that does not exist.
    """

    id: str
    """One of `IDS`."""
    kind: str
    """Which of the id's forms it has; selects the sentence."""
    severity: Severity
    epoch: int | None = None
    """Where it begins, if it begins somewhere."""
    step: int | None = None
    evidence: Mapping[str, Scalar] = field(default_factory=dict)
    """Named values from which the sentence is built. All numbers are finite."""
    cause: str | None = None
    """A key of `texts.CAUSES`, if the run shows the cause."""
    advice: tuple[Advice, ...] = ()
    """In the order in which to try them."""

    def __post_init__(self) -> None:
        if self.id not in IDS:
            raise ValueError(f"a finding's id must be one of {', '.join(IDS)}, but got {self.id!r}")
        if self.severity not in get_args(Severity):
            raise ValueError(f"a finding's severity must be info, warning or error, but got {self.severity!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "id": self.id,
            "kind": self.kind,
            "severity": self.severity,
            "epoch": self.epoch,
            "step": self.step,
            "evidence": dict(self.evidence),
            "cause": self.cause,
            "advice": [advice.to_dict() for advice in self.advice],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """The inverse of `to_dict`."""
        return cls(
            id=data["id"],
            kind=data["kind"],
            severity=data["severity"],
            epoch=data["epoch"],
            step=data["step"],
            evidence=dict(data["evidence"]),
            cause=data["cause"],
            advice=tuple(Advice.from_dict(item) for item in data["advice"]),
        )
