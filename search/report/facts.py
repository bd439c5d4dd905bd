"""All facts of the tuning log, each computed once; the templates of both languages only put them into words.

records -> experiments -> what they say together -> Facts
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from search import records
from search.captions import CAPTIONS, Pictured
from search.diagnosis.advise import HIGH_RATE
from search.leaderboard import is_repeat, searched, state_of
from search.records import StudyRecord, TrialRecord
from search.report import forecast, parameters, summary
from search.report import next_steps as steps
from search.report.board import Board, board, in_full
from search.report.epochs import Column, columns
from search.report.experiment import UNFINISHED, Experiment
from search.report.experiments import experiments_of
from search.report.forecast import Forecast, Outcome
from search.report.importance import Importance, importances
from search.report.measured_noise import Noise, measure
from search.report.next_steps import NextSteps
from search.report.parameters import Table
from search.report.summary import Budget, Lessons, Recommended, Sign
from search.verdict.leaders import PassedOver, passed_over, verdict_of, winner
from search.verdict.race import Verdict
from search.verdict.tested import TestLosses


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """How often gradients were clipped, over the steps recorded one by one."""

    steps: int
    clipped: int
    trials: int


@dataclass(frozen=True, kw_only=True)
class Said:
    """What was said of one image."""

    image: str
    """Its file's name."""
    reference: str
    base: str
    trials: tuple[tuple[int, str], ...]
    """(trial, its caption), the one that the study names first."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that the log says, in no language."""

    record: StudyRecord
    experiments: tuple[Experiment, ...]
    columns: tuple[Column, ...]
    """Metrics in the tables of epochs."""
    noise: Noise
    states: tuple[tuple[str, int], ...]
    """(state and reason, number of trials), in alphabetical order."""
    running: tuple[int, ...]
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    devices: tuple[str, ...]
    samples: tuple[tuple[int, int], ...]
    """(training samples, validation samples) of the runs, the most frequent first."""
    several: tuple[int, int] | None
    """(captions, images) of the data where images have several, by the latest run that says so."""
    main_samples: tuple[Any, ...] | None
    """The samples on which most trials were validated, see `records.SAMPLE_FIELDS`."""
    comparable: int
    """Trials whose losses are compared with one another in the tables."""
    median_loss: float | None
    """Median of the lowest losses of the trials that are compared."""
    incomparable: tuple[int, ...]
    """Trials with a loss that were validated on different samples than most."""
    budget: Budget
    tables: dict[str, Table]
    importances: tuple[Importance, ...]
    strategy: tuple[str, ...]
    """The order of tuning."""
    complete: int
    clipping: Clipping
    best: Recommended | None
    chosen: Experiment | None
    """What the study names: the trial of its verdict, else the first of its leaderboard."""
    curves: Outcome | None
    """What the model of all curves says."""
    board: Board
    full: tuple[int, ...]
    """Trials told in full; the others have a line each."""
    verdict: Verdict | None
    """What the repeats of the leaders say; None if none were asked for."""
    passed_over: PassedOver
    """Trials as near that were not repeated."""
    tested: TestLosses | None
    """The test loss of the verdict's candidates; None where it was not read for them."""
    repeats: tuple[TrialRecord, ...]
    """Those of one trial together; everything else here is without them."""
    next: NextSteps
    health: tuple[Sign, ...]
    trouble: tuple[Sign, ...]
    tree: dict[str, tuple[int, ...]]
    lessons: Lessons
    captions: tuple[Said, ...]
    """What base, the named trial, best and runner-up say of the images that all trials caption; empty if none did."""
    updated_s: float | None
    """When the latest of the trials and repeats began or ended, or a test loss was read, by the worker's clock; None
    before the first."""

    @property
    def by_cider(self) -> bool:
        """Whether the study ranks its trials by CIDEr-D."""
        return any(e.score is not None for e in self.experiments)

    def experiment(self, number: int) -> Experiment:
        """The experiment of a trial."""
        return next(e for e in self.experiments if e.number == number)

    @property
    def promise(self) -> Forecast | None:
        """The lowest of what more epochs are expected to bring."""
        longer = [f for f in self.curves.longer if f.trial in self.next.ran] if self.curves else []
        return min(longer, key=lambda f: (f.loss, f.trial), default=None)

    @property
    def stopped(self) -> dict[int, Forecast]:
        """What trials that were stopped by comparison would have come to, by trial."""
        return {f.trial: f for f in self.curves.stopped} if self.curves else {}

    @property
    def candidates(self) -> tuple[int, ...]:
        """Of the verdict, those that are repeated."""
        return tuple(each.number for each in self.verdict.standings) if self.verdict is not None else ()

    @property
    def repeats_of(self) -> dict[int, tuple[TrialRecord, ...]]:
        """The repeats by the trial that they repeat."""
        numbers = dict.fromkeys(t.attrs[records.REPEAT_OF] for t in self.repeats)
        return {n: tuple(t for t in self.repeats if t.attrs[records.REPEAT_OF] == n) for n in numbers}

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """All trials with the findings of the log, which judges them together: see `judged`. Repeats are among them,
        as they were recorded: the log judges none."""
        told = {e.number: [finding.to_dict() for finding in e.findings] for e in self.experiments}
        return tuple(
            replace(t, attrs={**t.attrs, records.FINDINGS: told[t.number]}) if told.get(t.number) else t
            for t in (*self.record.trials, *self.repeats)
        )


def gather(record: StudyRecord, *, options: Sequence[str] = ()) -> Facts:
    """The facts of a study. Pure: the same records, the same facts.

    Args:
        record: The study, see `search.reading.read_study`.
        options: Further options of the search's command line, such as `--runs-dir`, that its continuation needs.
    """
    # A trial that another program added to the study has no configuration of ours: nothing can be said about it.
    ours = tuple(t for t in record.trials if t.config or t.state != "COMPLETE")
    noise = measure(ours)
    verdict = verdict_of(ours, record.attrs)
    repeats = tuple(sorted((t for t in ours if is_repeat(t)), key=_as_repeated))
    record = replace(record, trials=tuple(searched(ours)))
    experiments = experiments_of(record.trials, noise)
    best = summary.recommended(experiments, noise)
    named = winner(record.trials, verdict)
    chosen = next((e for e in experiments if named is not None and e.number == named.number), None)
    samples = parameters.main_samples(experiments)
    judged = [e for e in experiments if e.judged]
    compared = [e.value for e in judged if e.samples == samples and e.value is not None]
    ranked = importances(record, experiments)
    curves = forecast.outcome(record, experiments, samples, noise)
    tested = TestLosses.of(record.attrs, verdict)
    moments = [*(t for e in ours for t in (e.start_s, e.end_s)), None if tested is None else tested.read_s]
    times = [t for t in moments if t is not None]
    sizes = Counter((e.tag("num_train_samples"), e.tag("num_val_samples")) for e in experiments)
    return Facts(
        record=record,
        experiments=experiments,
        columns=columns(record.trials),
        noise=noise,
        states=tuple(sorted(Counter(state_of(t) for t in record.trials).items())),
        running=tuple(e.number for e in experiments if e.record.state in UNFINISHED),
        models=_distinct(e.record.config.get("model") for e in experiments),
        datasets=_distinct(e.record.config.get("data") for e in experiments),
        devices=_distinct(e.record.tags.get("gpu") or e.record.tags.get("device") for e in experiments),
        samples=tuple((a, b) for (a, b), _ in sizes.most_common() if a is not None and b is not None),
        several=_several(experiments),
        main_samples=samples,
        comparable=len(compared),
        median_loss=median(compared) if compared else None,
        incomparable=tuple(e.number for e in judged if e.samples != samples),
        budget=summary.budget(experiments, repeats),
        tables=parameters.tables(experiments, noise),
        importances=ranked,
        strategy=summary.strategy(ranked),
        complete=sum(1 for t in record.trials if t.state == "COMPLETE"),
        clipping=_clipping(experiments),
        best=best,
        chosen=chosen,
        curves=curves,
        board=board(record, experiments, best.best if best else None, noise),
        full=in_full(experiments, chosen, best.best if best else None),
        verdict=verdict,
        passed_over=passed_over(ours, record.attrs),
        tested=tested,
        repeats=repeats,
        next=steps.next_steps(record, experiments, chosen, options, verdict=verdict, curves=curves),
        health=summary.health(experiments),
        trouble=summary.trouble(experiments),
        tree=summary.tree(experiments),
        lessons=summary.lessons(experiments, HIGH_RATE),
        captions=_captions(record, best, chosen),
        updated_s=max(times, default=None),
    )


def _as_repeated(trial: TrialRecord) -> tuple[int, int, int]:
    return (trial.attrs[records.REPEAT_OF], trial.attrs[records.BLOCK], trial.number)


def _captions(record: StudyRecord, best: Recommended | None, named: Experiment | None) -> tuple[Said, ...]:
    pictured = Pictured.of(record.attrs)
    if pictured is None or best is None:
        return ()
    # What a study names first, then the lowest losses: the named one may be neither of them.
    chosen = {e.number: e for e in (named, best.best, best.runner_up) if e is not None}.values()
    by_number = {trial.number: trial.attrs.get(CAPTIONS, ()) for trial in record.trials}
    said = [(e.number, by_number[e.number]) for e in chosen if len(by_number[e.number]) == len(pictured.images)]
    if not said:
        return ()
    return tuple(
        Said(
            image=Path(pictured.images[n]).name,
            reference=pictured.references[n],
            base=pictured.base[n],
            trials=tuple((number, str(texts[n])) for number, texts in said),
        )
        for n in range(len(pictured.images))
    )


def _distinct(values: Any) -> tuple[str, ...]:
    """Distinct values in order of first appearance."""
    return tuple(dict.fromkeys(str(value) for value in values if value))


def _several(experiments: Sequence[Experiment]) -> tuple[int, int] | None:
    for e in reversed(experiments):
        captions, images = e.tag("split.captions"), e.tag("split.rows")
        if captions is not None and images is not None and captions > images:
            return captions, images
    return None


def _clipping(experiments: Sequence[Experiment]) -> Clipping:
    steps = clipped = trials = 0
    for e in experiments:
        bound = e.record.config.get("max_grad_norm")
        # A record of a window of steps is a mean: it does not say how many of them were clipped.
        norms = [step.grad_norm for step in e.record.steps if step.grad_norm is not None]
        if bound is None or not norms or e.record.tags.get("step_window", "1") != "1":
            continue
        trials += 1
        steps += len(norms)
        clipped += sum(norm > bound for norm in norms)
    return Clipping(steps=steps, clipped=clipped, trials=trials)
