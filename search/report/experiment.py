"""One trial as the log describes it: what was changed, how each epoch went, what was learnt. Facts only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from search import records
from search.diagnosis import Advice, Curve, Finding, Leaf, curve_from_record, diagnose, leaf, primary
from search.diagnosis.noise import VAL_NOISE, relative
from search.leaderboard import LOG_FIELDS, sample_key
from search.records import TrialRecord
from search.report.epochs import EpochRow, Mark, epoch_rows
from search.report.measured_noise import Noise
from trainer.config import MACHINE_FIELDS

UNFINISHED = ("RUNNING", "WAITING")


@dataclass(frozen=True, kw_only=True)
class ConfigLine:
    """One line of the TRAINING_CONFIG block."""

    name: str
    value: Any
    before: Any = None
    changed: bool = False
    blamed: bool = False
    """Whether the trial's main finding advises another value."""


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """One thing learnt; `kind` selects the sentence, `values` fill it."""

    kind: str
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One trial with all that the log says about it."""

    record: TrialRecord
    label: str | None
    note: str | None
    lines: tuple[ConfigLine, ...]
    reference: int | None
    """Number of the trial that `lines` are compared with."""
    reference_is_best: bool
    rows: tuple[EpochRow, ...]
    findings: tuple[Finding, ...]
    leaf: Leaf | None
    learnt: tuple[Learnt, ...]
    seconds: float | None
    """Time that its epochs took; for a trial without any, the time from its start to its end."""
    epoch_seconds: float | None
    """Median."""
    own_epochs: int
    """Epochs run by this trial itself, without those of the trial that it resumes."""
    resumed_by: int | None

    @property
    def number(self) -> int:
        return self.record.number

    @property
    def value(self) -> float | None:
        return self.record.value

    @property
    def stage(self) -> str | None:
        """Its stage in the staged strategy; None in any other."""
        return self.record.attrs.get(records.STAGE)

    @property
    def resumes(self) -> int | None:
        """Number of the trial that this one resumes."""
        return self.record.attrs.get(records.RESUMES)

    @property
    def detail(self) -> str | None:
        """The reason in the worker's own words; None where the findings say the same."""
        judged = self.record.reason in (records.FINISHED, records.RISING, records.DIVERGED, records.NON_FINITE)
        return None if judged and self.findings else self.record.detail

    @property
    def planned_epochs(self) -> int:
        return int(self.record.config.get("num_epochs") or 0)

    @property
    def main_finding(self) -> Finding | None:
        return primary(self.findings) if self.findings else None

    @property
    def mark(self) -> Mark:
        """The whole trial's mark: by the severity of its findings; `bad` where it failed or broke a constraint."""
        if self.record.state in UNFINISHED:
            return "unknown"
        if self.record.state == "FAIL" or self.record.violated:
            return "bad"
        severities = {finding.severity for finding in self.findings}
        return "bad" if "error" in severities else "warning" if "warning" in severities else "good"

    @property
    def judged(self) -> bool:
        """Whether its lowest validation loss says something about its configuration: a trial that was stopped by a
        pruner that compares trials, or by a person, might have come lower."""
        ran = self.record.state == "COMPLETE" or self.record.reason in (records.RISING, records.DIVERGED)
        return ran and self.value is not None and not self.record.violated

    @property
    def samples(self) -> tuple[Any, ...]:
        """What decides the samples that it was validated on."""
        return sample_key(self.record)

    @property
    def analysis(self) -> tuple[tuple[Finding, tuple[Advice, ...]], ...]:
        """The findings, each with the advice that no earlier finding gave."""
        given: list[Advice] = []
        found = []
        for finding in self.findings:
            new = tuple(advice for advice in finding.advice if advice not in given)
            given += new
            found.append((finding, new))
        return tuple(found)

    def tag(self, name: str) -> int | None:
        """A count from the run's tags; None where it is missing."""
        text = self.record.tags.get(name, "")
        return int(text) if text.isdecimal() else None

    def has(self, *ids: str) -> bool:
        return any(finding.id in ids for finding in self.findings)


def by_loss(experiment: Experiment) -> tuple[float, int]:
    """Sort key: the lowest validation loss first, of equals the first trial; trials without a loss last."""
    return (math.inf if experiment.value is None else experiment.value, experiment.number)


def experiments_of(trials: Sequence[TrialRecord], noise: Noise) -> tuple[Experiment, ...]:
    """All trials in order, each compared with the best one before it."""
    resumed = {t.attrs[records.RESUMES]: t.number for t in trials if records.RESUMES in t.attrs}
    by_number = {t.number: t for t in trials}
    varied = _varied(trials)
    found: list[Experiment] = []
    for trial in trials:
        best, previous = _reference(trial, found)
        before = by_number.get(trial.attrs.get(records.RESUMES, -1))
        found.append(_experiment(trial, best, previous, before, resumed.get(trial.number), varied, noise))
    return tuple(found)


def _reference(trial: TrialRecord, before: Sequence[Experiment]) -> tuple[Experiment | None, Experiment | None]:
    """(the best trial known when this one began, the one before it).

    Trials validated on the same samples come first, since only their losses compare.
    """
    earlier = [
        e
        for e in before
        if e.record.config and (trial.start_s is None or e.record.end_s is None or e.record.end_s <= trial.start_s)
    ]
    complete = [e for e in earlier if e.record.state == "COMPLETE" and e.value is not None]
    same = [e for e in complete if e.samples == sample_key(trial)]
    best = min(same or complete, key=by_loss, default=None)
    return best, (earlier[-1] if earlier else None)


def _experiment(
    trial: TrialRecord,
    best: Experiment | None,
    previous: Experiment | None,
    continued: TrialRecord | None,
    resumed_by: int | None,
    varied: frozenset[str],
    noise: Noise,
) -> Experiment:
    # What it is, compared with what came before.
    findings = _findings(trial)
    reference = best or previous
    rows = epoch_rows(trial, findings)
    lines = _config_lines(trial, reference, varied, findings)
    # Its own epochs and their time, without those of the trial that it resumes.
    times = [row.record.epoch_seconds for row in rows if row.record.epoch_seconds is not None]
    lasted = trial.end_s - trial.start_s if trial.start_s is not None and trial.end_s is not None else None
    inherited = len(continued.epochs) if continued is not None else 0
    own = max(0, len(rows) - inherited)
    seconds = sum(times[-own:]) if own and len(times) >= own else lasted
    label, note = trial.attrs.get(records.LABEL), trial.attrs.get(records.NOTE)
    return Experiment(
        record=trial,
        label=str(label) if label else None,
        note=str(note) if note else None,
        lines=lines,
        reference=reference.number if reference is not None else None,
        reference_is_best=best is not None,
        rows=rows,
        findings=findings,
        leaf=leaf(findings) if findings else None,
        learnt=_learnt(trial, best, lines, rows, noise),
        seconds=seconds,
        epoch_seconds=median(times) if times else None,
        own_epochs=own,
        resumed_by=resumed_by,
    )


def _findings(trial: TrialRecord) -> tuple[Finding, ...]:
    """The recorded findings, else those of the curves. A trial that has not ended, or failed, has none."""
    recorded = trial.attrs.get(records.FINDINGS)
    if recorded:
        return tuple(Finding.from_dict(data) for data in recorded)
    if trial.state not in ("COMPLETE", "PRUNED"):
        return ()
    curve: Curve = curve_from_record(trial)
    return diagnose(curve)


def _varied(trials: Sequence[TrialRecord]) -> frozenset[str]:
    """Fields in which any two trials differ."""
    seen: dict[str, set[str]] = {}
    for trial in trials:
        for name, value in trial.config.items():
            seen.setdefault(name, set()).add(repr(value))
    return frozenset(name for name, values in seen.items() if len(values) > 1 and name not in MACHINE_FIELDS)


def _config_lines(
    trial: TrialRecord, reference: Experiment | None, varied: frozenset[str], findings: Sequence[Finding]
) -> tuple[ConfigLine, ...]:
    """The log's fields and whatever else varies in this study; what changed against the reference is marked."""
    config = trial.config
    names = [name for name in LOG_FIELDS if name in config]
    names += [name for name in config if name in varied and name not in names]
    other = reference.record.config if reference is not None else {}
    main = primary(findings) if findings else None
    blamed = {main.advice[0].parameter} if main is not None and main.severity != "info" and main.advice else set()
    return tuple(
        ConfigLine(
            name=name,
            value=config[name],
            before=other.get(name),
            changed=name in other and other[name] != config[name],
            blamed=name in blamed,
        )
        for name in names
    )


def _learnt(
    trial: TrialRecord,
    best: Experiment | None,
    lines: Sequence[ConfigLine],
    rows: Sequence[EpochRow],
    noise: Noise,
) -> tuple[Learnt, ...]:
    """What the trial added to what was known when it began."""
    if trial.state in UNFINISHED:
        return ()
    found = [_compared(trial, best, noise)]
    changed = [line for line in lines if line.changed]
    if best is not None and changed and found[0].kind not in ("no_value", "incomparable"):
        one = changed[0]
        if len(changed) == 1:
            values = {"name": one.name, "before": one.before, "after": one.value, "reference": best.number}
            found.append(Learnt(kind="one_change", values=values))
        else:
            names = tuple(line.name for line in changed)
            found.append(Learnt(kind="many_changes", values={"names": names, "reference": best.number}))
    if trial.violated:
        found.append(Learnt(kind="constraint", values={"name": trial.violated[0]}))
    seen = [row for row in rows if row.val_loss is not None]
    if trial.value is not None and seen and not trial.violated and trial.best_epoch != seen[-1].epoch:
        rise = relative(seen[-1].val_loss or 0.0, trial.value)
        if rise > VAL_NOISE:
            found.append(
                Learnt(
                    kind="best_before_last", values={"best": trial.best_epoch, "last": seen[-1].epoch, "rise": rise}
                )
            )
    return tuple(found)


def _compared(trial: TrialRecord, best: Experiment | None, noise: Noise) -> Learnt:
    """The trial's loss against the best before it."""
    if trial.value is None or trial.violated:
        return Learnt(kind="no_value", values={"reason": trial.reason})
    if best is None or best.value is None:
        return Learnt(kind="first", values={"value": trial.value})
    values = {"reference": best.number, "value": trial.value, "before": best.value}
    if best.samples != sample_key(trial):
        return Learnt(kind="incomparable", values=values)
    share = relative(trial.value, best.value)
    values["share"] = abs(share)
    if trial.state != "COMPLETE" and share < 0:
        return Learnt(kind="pruned_lower", values={**values, "epoch": trial.best_epoch})
    if abs(share) <= noise.difference:
        return Learnt(kind="within_noise", values=values)
    return Learnt(kind="better" if share < 0 else "worse", values=values)
