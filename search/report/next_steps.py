"""What to do next, from all trials together: each step is a command whose result the next log takes up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from search import records
from search.diagnosis import finding as ids
from search.records import StudyRecord
from search.report import commands, regions
from search.report.experiment import UNFINISHED, Experiment
from search.report.forecast import LONGER, Outcome
from search.report.regions import Edge, Gap
from search.space import from_dict
from search.verdict.race import Verdict

SCHEDULE = "cosine"
"""The decay that is advised where none was tried; the hand-run log names it first."""

Kind = Literal["finish", "longer", "confirm", "decide", "warmup", "widen", "more", "schedule", "data", "export"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing to do."""

    kind: Kind
    command: str


@dataclass(frozen=True, kw_only=True)
class NextSteps:
    """What is open, and the commands that would answer it, the most urgent first."""

    steps: tuple[Step, ...]
    waiting: tuple[int, ...]
    ran: tuple[int, ...]
    """Trials that ran all their epochs and did not fall apart."""
    falling: tuple[int, ...]
    """Of those, the ones that more epochs are expected to lower by more than noise; without a model, those that still
    fall at their end."""
    longer_epochs: int | None
    edges: tuple[Edge, ...]
    gaps: tuple[Gap, ...]
    untried: tuple[tuple[str, tuple[Any, ...]], ...]
    """(parameter, its values that no trial had), for parameters with a few values."""
    long_warmups: tuple[int, ...]
    """Trials whose warmup was longer than their training, if they are at least half of all trials."""
    warmup_limit: int | None
    """A tenth of the steps of such a trial, the share in the hand-run log."""
    more_trials: int
    more_epochs: int | None
    """Instead of trials, for a study whose budget is epochs."""
    rows: int | None
    """Rows that the best trial used, where `max_samples` left others out."""

    def command(self, kind: Kind) -> str | None:
        """The command of a step; None if it is not advised."""
        return next((step.command for step in self.steps if step.kind == kind), None)

    @property
    def first(self) -> Step | None:
        """The most urgent step that needs no change of the study file."""
        return next((step for step in self.steps if step.kind not in ("warmup", "widen")), None)


def next_steps(
    record: StudyRecord,
    experiments: Sequence[Experiment],
    best: Experiment | None,
    options: Sequence[str],
    *,
    verdict: Verdict | None = None,
    curves: Outcome | None = None,
) -> NextSteps:
    """What to do next.

    Args:
        record: The study.
        experiments: Its trials.
        best: The one that it names.
        options: Further options of the search's command line, such as `--runs-dir`, that its continuation needs.
        verdict: What repeats of the leaders have shown.
        curves: What the model of the curves says.
    """
    finished = [e for e in experiments if e.record.state not in UNFINISHED]
    space = from_dict(record.definition.get("space", {}))
    long_warmups = [e for e in finished if e.has(ids.WARMUP_EXCEEDS_TRAINING)]
    often = bool(long_warmups) and 2 * len(long_warmups) >= len(finished)
    totals = [total for e in long_warmups if (total := e.tag("total_steps")) is not None]
    waiting = tuple(e.number for e in experiments if e.record.state == "WAITING")
    ran, falling = _falling(experiments, curves)
    epochs = _longer(experiments, ran, falling)
    edges = regions.edges(space, best)
    done = sum(1 for e in experiments if records.RESUMES not in e.record.attrs)
    # The trials so far and half as many again, at least six: enough for a sampler to build on.
    more = done + max(6, math.ceil(done / 2))
    steps: list[Step] = []
    held = record.attrs.get(records.EPOCHS)
    budget = held if isinstance(held, int) else None
    more_epochs = None if budget is None else math.ceil(1.5 * budget)

    def searched(trials: int, spend: int | None) -> str:
        limit = ["--trials", str(trials)] if spend is None else ["--epochs", str(spend)]
        return commands.search(record, experiments, [*limit, *options])

    anew = commands.search(record, experiments, ["--fresh", *_spending(budget), *options])
    if waiting:
        steps.append(Step(kind="finish", command=searched(done, budget)))
    if epochs is not None:
        spent = None if budget is None else math.ceil(LONGER * budget)
        longer = commands.changed(record, experiments, {"num_epochs": str(epochs)}, [*_spending(spent), *options])
        steps.append(Step(kind="longer", command=longer))
    again = commands.repeated(record, verdict, options) if _repeatable(experiments) else None
    if again is not None:
        steps.append(Step(kind="decide" if verdict is not None else "confirm", command=again))
    if often:
        steps.append(Step(kind="warmup", command=anew))
    if edges:
        steps.append(Step(kind="widen", command=anew))
    if space:
        steps.append(Step(kind="more", command=searched(more, more_epochs)))
    further = [*_spending(budget), *options]
    if space and best is not None and _is_constant(record, best):
        decay = commands.changed(record, experiments, {"lr_scheduler_type": SCHEDULE}, further)
        steps.append(Step(kind="schedule", command=decay))
    rows = _rows(best)
    if space and rows is not None:
        whole = commands.changed(record, experiments, {"max_samples": "none"}, further)
        steps.append(Step(kind="data", command=whole))
    if not steps and verdict is not None and best is not None:
        steps.append(Step(kind="export", command=commands.export(record, options)))
    return NextSteps(
        steps=tuple(steps),
        waiting=waiting,
        ran=ran,
        falling=falling,
        longer_epochs=epochs,
        edges=edges,
        gaps=regions.gaps(space, finished),
        untried=regions.untried(space, finished),
        long_warmups=tuple(e.number for e in long_warmups) if often else (),
        warmup_limit=int(median(totals) / 10) if often and totals else None,
        more_trials=more,
        more_epochs=more_epochs,
        rows=rows,
    )


def _is_constant(record: StudyRecord, best: Experiment) -> bool:
    """Whether no schedule was tried: the rate stays as it is after the warmup."""
    name = "lr_scheduler_type"
    return name not in record.definition.get("space", {}) and best.record.config.get(name) == "constant_with_warmup"


def _rows(best: Experiment | None) -> int | None:
    """Rows that a trial used; None where they were all, or how many is not known."""
    if best is None:
        return None
    bound, train, val = best.record.config.get("max_samples"), *map(best.tag, ("num_train_samples", "num_val_samples"))
    if bound is None or train is None or val is None or train + val < bound or best.tag("split.left_out") == 0:
        return None
    return int(train + val)


def _spending(epochs: int | None) -> list[str]:
    return [] if epochs is None else ["--epochs", str(epochs)]


def _falling(experiments: Sequence[Experiment], curves: Outcome | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(trials that ran all their epochs, those of them that more epochs would lower): by the model of the curves, and
    without one by each trial's own finding."""
    # A trial that fell apart, or whose rate is to be changed first, says nothing about the number of epochs.
    possible = [e for e in experiments if e.judged and e.leaf is not None and e.leaf.name in ("good", "longer")]
    if curves is not None:
        numbers = {e.number for e in possible}
        ran_all = tuple(f.trial for f in curves.longer if f.trial in numbers)
        return ran_all, tuple(number for number in curves.falling if number in ran_all)
    ran = [e for e in possible if e.record.state == "COMPLETE" and len(e.rows) >= e.planned_epochs > 0]
    falling = [e for e in ran if e.leaf is not None and e.leaf.name == "longer"]
    return tuple(e.number for e in ran), tuple(e.number for e in falling)


def _longer(experiments: Sequence[Experiment], ran: Sequence[int], falling: Sequence[int]) -> int | None:
    """Epochs to train, where most of the trials that ran all of theirs would gain by more."""
    if not falling or 2 * len(falling) < len(ran):
        return None
    planned = median(e.planned_epochs for e in experiments if e.number in ran)
    return math.ceil(LONGER * planned)


def _repeatable(experiments: Sequence[Experiment]) -> bool:
    """Whether there are two trials to tell apart."""
    samples = [e.samples for e in experiments if e.record.state == "COMPLETE" and e.judged]
    return any(samples.count(each) > 1 for each in samples)
