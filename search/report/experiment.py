"""One trial as the log describes it: what was changed, how each epoch went, what was learnt. Plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from search import records
from search.diagnosis import Advice, Finding, Leaf, primary
from search.diagnosis.finding import INCONCLUSIVE
from search.leaderboard import sample_key
from search.records import TrialRecord
from search.report.epochs import EpochRow, Mark

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
class Against:
    """An earlier trial that another is told against."""

    trial: Experiment
    kind: Literal["best", "elsewhere", "previous"]
    """best: the lowest loss before it on the same samples; elsewhere: complete on other samples, the most alike;
    previous: none of these, the latest with a loss on the same samples, else on others, else the latest."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One trial with all that the log says about it."""

    record: TrialRecord
    label: str | None
    note: str | None
    lines: tuple[ConfigLine, ...]
    against: Against | None
    """What it is compared with."""
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
    def score(self) -> float | None:
        """CIDEr-D of its validation captions, where the study ranks by it."""
        return records.score_of(self.record.attrs)

    @property
    def stage(self) -> str | None:
        """Its stage in a study that an older version ran by stages; None in any other."""
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
        if self.has(INCONCLUSIVE):
            return "unknown"
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
    def changes(self) -> tuple[ConfigLine, ...]:
        """What differs from the trial it is told against."""
        return tuple(line for line in self.lines if line.changed)

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


def own_cost(trial: TrialRecord, continued: TrialRecord | None) -> tuple[int, float | None]:
    """(epochs, seconds) of a trial itself, without those of the trial that it continues; for one without any epoch the
    time from its start to its end."""
    times = [epoch.epoch_seconds for epoch in trial.epochs if epoch.epoch_seconds is not None]
    lasted = trial.end_s - trial.start_s if trial.start_s is not None and trial.end_s is not None else None
    own = max(0, len(trial.epochs) - (len(continued.epochs) if continued is not None else 0))
    return own, sum(times[-own:]) if own and len(times) >= own else lasted


def by_loss(experiment: Experiment) -> tuple[float, int]:
    """Sort key: the lowest validation loss first, of equals the first trial; trials without a loss last."""
    return (math.inf if experiment.value is None else experiment.value, experiment.number)
