"""A study's trials as the log describes them: judged together, and each told against those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from search import records
from search.diagnosis import Finding, leaf, primary
from search.leaderboard import LOG_FIELDS
from search.records import TrialRecord
from search.report import told
from search.report.epochs import epoch_rows
from search.report.experiment import ConfigLine, Experiment, own_cost
from search.report.judged import findings
from search.report.measured_noise import Noise
from trainer.config import MACHINE_FIELDS


def experiments_of(trials: Sequence[TrialRecord], noise: Noise) -> tuple[Experiment, ...]:
    """All trials by number, each compared with those before it in the telling."""
    resumed = {t.attrs[records.RESUMES]: t.number for t in trials if records.RESUMES in t.attrs}
    by_number = {t.number: t for t in trials}
    varied = _varied(trials)
    judged = findings(trials, noise)
    found: list[Experiment] = []
    met = told.Before()
    for trial in sorted(trials, key=lambda t: t.number):
        before = by_number.get(trial.attrs.get(records.RESUMES, -1))
        bare = _experiment(trial, judged[trial.number], before, resumed.get(trial.number), noise)
        against = met.reference(bare)
        lines = _config_lines(trial, against.trial if against else None, varied, bare.findings)
        compared = replace(bare, lines=lines, against=against)
        found.append(replace(compared, learnt=told.learnt(compared, met, noise)))
        met.add(found[-1])
    return tuple(found)


def _experiment(
    trial: TrialRecord,
    findings: tuple[Finding, ...],
    continued: TrialRecord | None,
    resumed_by: int | None,
    noise: Noise,
) -> Experiment:
    """The trial by itself, compared with nothing yet."""
    rows = epoch_rows(trial, findings, noise.deviation)
    times = [row.record.epoch_seconds for row in rows if row.record.epoch_seconds is not None]
    own, seconds = own_cost(trial, continued)
    label, note = trial.attrs.get(records.LABEL), trial.attrs.get(records.NOTE)
    return Experiment(
        record=trial,
        label=str(label) if label else None,
        note=str(note) if note else None,
        lines=(),
        against=None,
        rows=rows,
        findings=findings,
        leaf=leaf(findings) if findings else None,
        learnt=(),
        seconds=seconds,
        epoch_seconds=median(times) if times else None,
        own_epochs=own,
        resumed_by=resumed_by,
    )


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
