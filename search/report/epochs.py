"""A trial's epochs, each with the mark the hand-run log would give it, and the metrics that are shown of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from search import records
from search.diagnosis import Finding
from search.diagnosis import finding as ids
from search.diagnosis.noise import TRAIN_NOISE, VAL_NOISE, limit, relative, usable
from search.records import EpochRecord, TrialRecord, finite

Mark = Literal["good", "warning", "bad", "unknown"]

UNSTABLE = (ids.NON_FINITE, ids.EXPLODING_GRADIENT, ids.DIVERGED, ids.OSCILLATING, ids.OVERFITTING)
"""Findings of runs that went wrong, as opposed to runs that did not get far enough."""

LOSSES = ("train_loss", "val_loss")
"""Columns shown even where no epoch has a value: the marks are about them."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric in the tables of epochs, as its field of `EpochRecord` describes it."""

    name: str
    """The field."""
    heading: Mapping[str, str]
    """By language."""
    format: str
    """A format spec."""


def columns(trials: Sequence[TrialRecord]) -> tuple[Column, ...]:
    """The metrics whose field has a heading, in the fields' order; without those that no epoch of the study has."""
    epochs = [epoch for trial in trials for epoch in trial.epochs]
    described = {field.name: field.metadata for kind in {type(epoch) for epoch in epochs} for field in fields(kind)}
    return tuple(
        Column(name=name, heading=metadata["heading"], format=metadata.get("format", ".4g"))
        for name, metadata in described.items()
        if "heading" in metadata and (name in LOSSES or any(finite(getattr(epoch, name)) for epoch in epochs))
    )


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One epoch with its mark.

    bad: a loss is not finite, or the training loss lies above its lowest by more than noise, in a run that the
    diagnosis finds unstable; warning: the same in any other run or at the trial's best epoch, or the validation loss
    lies above its best so far by more than one standard deviation of noise; good: none of these; unknown: a loss was
    not recorded. The hand-run log uses the marks in this way: in its experiment 3 a rise of the validation loss alone
    is a warning, a rise of the training loss is bad.

    Why the diagnosis is asked: the noise was measured on the recorded runs, with 320 training samples and more. With
    a few dozen samples the training loss moves by more than that in a run that is not broken.
    """

    record: EpochRecord
    """The epoch's metrics, with None for a loss that cannot be calculated with."""
    mark: Mark
    is_best: bool
    val_rise: float | None
    """Share above the best so far; None where it is too small to count."""
    train_rise: float | None

    @property
    def epoch(self) -> int:
        return self.record.epoch

    @property
    def train_loss(self) -> float | None:
        return self.record.train_loss

    @property
    def val_loss(self) -> float | None:
        return self.record.val_loss


def epoch_rows(trial: TrialRecord, findings: Sequence[Finding] = (), noise: float = VAL_NOISE) -> tuple[EpochRow, ...]:
    """The trial's epochs with their marks.

    Args:
        trial: The trial.
        findings: Its findings.
        noise: Standard deviation of a validation loss, a share of the loss.
    """
    rows = []
    unstable = any(finding.id in UNSTABLE for finding in findings)
    broke = trial.reason == records.NON_FINITE or any(tag.startswith("nonfinite.") for tag in trial.tags)
    best_val: float | None = None
    best_train: float | None = None
    for record in trial.epochs:
        val = record.val_loss if usable(record.val_loss) else None
        train = record.train_loss if usable(record.train_loss) else None
        val_rise = None if val is None or best_val is None else relative(val, best_val)
        train_rise = None if train is None or best_train is None else relative(train, best_train)
        train_up = train_rise is not None and train_rise > limit(TRAIN_NOISE)
        val_up = val_rise is not None and val_rise > noise
        missing: Mark = "bad" if broke else "unknown"
        best = record.epoch == trial.best_epoch
        # The epoch that the trial is taken for is not called bad in the same line.
        mark: Mark = "bad" if train_up and unstable and not best else "warning" if train_up or val_up else "good"
        if (val is None or train is None) and mark != "bad":
            mark = missing
        rows.append(
            EpochRow(
                record=replace(record, train_loss=train, val_loss=val),
                mark=mark,
                is_best=best,
                val_rise=val_rise if val_up else None,
                train_rise=train_rise if train_up else None,
            )
        )
        best_val = val if best_val is None else min(best_val, val if val is not None else best_val)
        best_train = train if best_train is None else min(best_train, train if train is not None else best_train)
    return tuple(rows)
