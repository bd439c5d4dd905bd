"""What the trials say about each parameter: the ranges tried, what was seen there, how certain it is. Facts only."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

import numpy as np

from search.diagnosis import finding as ids
from search.diagnosis import messages
from search.diagnosis.noise import relative
from search.diagnosis.tree import SMALL_STEPS
from search.report.epochs import UNSTABLE
from search.report.experiment import UNFINISHED, Experiment, by_loss
from search.report.judged import rate_of
from search.report.level import Level, is_stopped, level
from search.report.measured_noise import Noise
from search.report.trend import CHANCE, RESAMPLES, Trend, holm, trend_of

FEWEST = 3
"""Fewest trials for a range to be anything but "not yet known". Of two trials either may be the odd one."""
SURE = 10
"""Fewest trials for a statement to be called more than an indication."""

BROKEN = (ids.NON_FINITE, ids.EXPLODING_GRADIENT, ids.DIVERGED)
AGGRESSIVE = UNSTABLE
DTYPE_CAUSES = ("zero_over_zero", "square_underflow")
"""Causes in the dtype that the diagnosis proves from a run's own numbers (search.diagnosis.faults)."""
RATES = ("effective_rate", "learning_rate")
TOLD = ("unstable", "aggressive", "masked", "conservative")
"""Verdicts on a range that are worth telling whatever its medians say."""

Verdict = Literal["unknown", "unstable", "aggressive", "masked", "conservative", "good", "usable", "behind", "only"]
"""unstable: called too aggressive for a rate. masked: slow, but the warmup kept the rate from being reached.
only: there is no other range to compare it with."""

EDGES = {
    # Half decades, as the hand-run log went: 5e-6, 5e-4, 1e-3, 2e-4.
    "effective_rate": tuple(m * 10.0**e for e in range(-10, 4) for m in (1, 3)),
    "learning_rate": tuple(m * 10.0**e for e in range(-8, 2) for m in (1, 3)),
    "lora_r": tuple(2.0**e for e in range(11)),
    "lora_alpha": tuple(2.0**e for e in range(13)),
    "batch_size": tuple(2.0**e for e in range(13)),
    "num_epochs": tuple(2.0**e for e in range(13)),
    "lora_dropout": (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
    "warmup_share": (0.0, 1e-9, 0.1, 0.25, 0.5, 1.0),
}
"""Where the ranges of a table begin; a row gives the lowest and highest value tried in its range."""
EXACT_UP_TO = 4
"""A parameter with at most this many distinct values gets one row for each."""

Read = Callable[[Experiment], Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One range of a parameter."""

    low: Any
    high: Any
    trials: tuple[int, ...]
    """All finished trials in it."""
    valued: int
    """Number of those whose losses compare with the rest of the table."""
    best: float | None
    best_trial: int | None
    best_epoch: int | None
    median: float | None
    findings: tuple[tuple[str, int], ...]
    """(key of a finding, see `messages.key`; number of trials with it as their main one), most frequent first."""
    verdict: Verdict
    level: Level | None
    """The values of those that are as low as the best, within noise; None where none is."""
    stopped: int
    """Number of its trials that were stopped by comparison, and so have no loss that compares."""

    @property
    def n(self) -> int:
        return len(self.trials)


@dataclass(frozen=True, kw_only=True)
class Table:
    """One parameter."""

    name: str
    rows: tuple[Row, ...]
    trend: Trend | None
    spread: float | None
    """Largest difference between the medians of rows with enough trials, a share; None below two such rows."""
    within_noise: bool | None
    chance: float | None
    """How often the medians differ as much when the losses are shuffled among those trials: the other parameters vary
    too, and with few trials in a row that alone moves medians. By Holm's method (1979) for all comparisons:
    of nine tables at 5 % each, a third of studies in which nothing matters would show something."""

    @property
    def shown(self) -> tuple[Row, ...]:
        """The rows worth a line: all of a rate's own table, else those that are known or have the best trial."""
        if self.name == "learning_rate":
            return self.rows
        best = min((row.best for row in self.rows if row.best is not None), default=None)
        return tuple(row for row in self.rows if row.verdict != "unknown" or row.best == best)

    @property
    def as_low(self) -> tuple[Level, ...]:
        """Range by range, the values that did as well as the best; none where too few trials say so."""
        told = [row for row in self.rows if row.verdict in ("good", "usable", "unknown") and row.level is not None]
        found = tuple(row.level for row in told if row.level is not None)
        several = sum(row.valued > 0 for row in self.rows) > 1 and sum(len(each.trials) for each in found) >= FEWEST
        return found if several or any(row.verdict in ("good", "usable") for row in told) else ()

    @property
    def differs(self) -> bool:
        """Whether its ranges differ by more than noise, and by more than shuffling makes of it."""
        return self.within_noise is False and self.chance is not None and self.chance <= CHANCE

    @property
    def direction(self) -> Trend | None:
        """The trend, where it is shown and no other comparison of the same losses calls it chance."""
        if self.trend is None or not self.trend.shown or self.name in RATES:
            return None
        return None if self.chance is not None and not self.differs else self.trend

    @property
    def says(self) -> bool:
        """Whether it shows anything about its parameter."""
        told = any(row.verdict in TOLD for row in self.rows)
        return len(self.rows) > 1 and (told or self.differs or self.direction is not None)


def field(name: str) -> Read:
    """A reader of a configuration field."""
    return lambda experiment: experiment.record.config.get(name)


def ratio(experiment: Experiment) -> float | None:
    """alpha / rank, the scale of LoRA's update."""
    rank, alpha = experiment.record.config.get("lora_r"), experiment.record.config.get("lora_alpha")
    return alpha / rank if rank and alpha else None


def effective_rate(experiment: Experiment) -> float | None:
    """The rate by which one step moves the model, at the usual batch and rank (`search.planning.coordinates`)."""
    rate = rate_of(experiment.record.config)
    return None if rate is None else float(10**rate)


def warmup_share(experiment: Experiment) -> float | None:
    """Warmup as a share of all steps planned for the run."""
    warmup, total = experiment.record.config.get("warmup_steps"), experiment.tag("total_steps")
    return warmup / total if warmup is not None and total else None


READERS: dict[str, Read] = {
    "effective_rate": effective_rate,
    "learning_rate": field("learning_rate"),
    "lora_r": field("lora_r"),
    "lora_alpha": field("lora_alpha"),
    "alpha_per_r": ratio,
    "lora_dropout": field("lora_dropout"),
    "batch_size": field("batch_size"),
    "warmup_share": warmup_share,
    "lr_scheduler_type": field("lr_scheduler_type"),
    "num_epochs": field("num_epochs"),
    "torch_dtype": field("torch_dtype"),
}
"""The tables of the log, in its order."""
IF_VARIED = ("lr_scheduler_type", "num_epochs")
"""Those that are left out where all trials have one value: most studies do not search them."""


def main_samples(experiments: Sequence[Experiment]) -> tuple[Any, ...] | None:
    """The samples on which most judged trials were validated: only those trials' losses are compared."""
    counts = Counter(e.samples for e in experiments if e.judged)
    first = {key: min(e.number for e in experiments if e.samples == key) for key in counts}
    return min(counts, key=lambda key: (-counts[key], first[key]), default=None)


def tables(experiments: Sequence[Experiment], noise: Noise) -> dict[str, Table]:
    """A table for each of `READERS` for which at least one trial has a value."""
    finished = [e for e in experiments if e.record.state not in UNFINISHED and e.record.state != "FAIL" and e.findings]
    samples = main_samples(experiments)
    found = {}
    for name, read in READERS.items():
        rows = _rows(name, read, finished, samples, noise)
        if not rows or (len(rows) == 1 and name in IF_VARIED):
            continue
        spread, chance = _spread(rows, {e.number: e.value for e in finished if e.judged and e.samples == samples})
        found[name] = Table(
            name=name,
            rows=rows,
            trend=trend_of((read(e), e.value) for e in finished if e.judged and e.samples == samples),
            spread=spread,
            within_noise=None if spread is None else spread <= noise.difference,
            chance=chance,
        )
    return _for_all(found)


def _for_all(found: dict[str, Table]) -> dict[str, Table]:
    """The tables with their chances, and those of their trends, corrected for how many there are: for the rates, of
    which it is known that they matter, among themselves."""
    medians = {name: table.chance for name, table in found.items() if table.chance is not None}
    trends = {name: table.trend.chance for name, table in found.items() if table.trend is not None}
    rates = holm({name: chance for name, chance in medians.items() if name in RATES})
    others = {("medians", name): chance for name, chance in medians.items() if name not in RATES}
    others |= {("trend", name): chance for name, chance in trends.items() if name not in RATES}
    others = holm(others)
    return {
        name: replace(
            table,
            chance=rates.get(name, others.get(("medians", name))),
            trend=table.trend and replace(table.trend, chance=others.get(("trend", name), table.trend.chance)),
        )
        for name, table in found.items()
    }


def _spread(rows: Sequence[Row], losses: dict[int, float | None]) -> tuple[float | None, float | None]:
    """(largest difference between medians of rows with enough trials, how often shuffled losses differ as much)."""
    groups = [[losses[n] for n in row.trials if losses.get(n) is not None] for row in rows if row.valued >= FEWEST]
    if len(groups) < 2:
        return None, None
    pooled = np.array([value for group in groups for value in group], dtype=float)
    rng = np.random.default_rng(0)  # seeded: the same records, the same share
    shuffled = np.vstack([pooled, rng.permuted(np.tile(pooled, (RESAMPLES, 1)), axis=1)])
    ends = np.cumsum([len(group) for group in groups])[:-1]
    medians = np.stack([np.median(part, axis=1) for part in np.split(shuffled, ends, axis=1)])
    spreads = medians.max(axis=0) - medians.min(axis=0)
    # The measured order counts as one of the shuffles: without it the share could be 0.
    chance = (1 + int((spreads[1:] >= spreads[0] * (1 - 1e-12)).sum())) / (1 + RESAMPLES)
    return relative(float(medians[:, 0].max()), float(medians[:, 0].min())), chance


def _rows(
    name: str, read: Read, finished: Sequence[Experiment], samples: tuple[Any, ...] | None, noise: Noise
) -> tuple[Row, ...]:
    valued = [(read(e), e) for e in finished if read(e) is not None]
    comparable = [e for _, e in valued if e.judged and e.samples == samples]
    best = min(comparable, key=by_loss, default=None)
    edges = EDGES.get(name)
    groups: dict[Any, list[tuple[Any, Experiment]]] = {}
    exact = edges is None or len({value for value, _ in valued}) <= EXACT_UP_TO
    for value, experiment in valued:
        # A value on an edge belongs to the range above it, also where it is off by rounding.
        key = value if exact or edges is None else bisect.bisect_right(edges, value * (1 + 1e-9))
        groups.setdefault(key, []).append((value, experiment))
    ordered = sorted(groups.items(), key=lambda item: item[0])
    rows = tuple(_row(name, members, samples, best, noise) for _, members in ordered)
    if sum(row.valued > 0 for row in rows) > 1:
        return rows
    return tuple(replace(row, verdict="only") if row.verdict in ("good", "usable", "behind") else row for row in rows)


def _row(
    name: str,
    members: Sequence[tuple[Any, Experiment]],
    samples: tuple[Any, ...] | None,
    best: Experiment | None,
    noise: Noise,
) -> Row:
    values = [value for value, _ in members]
    compared = [e for _, e in members if e.judged and e.samples == samples]
    losses = [e.value for e in compared if e.value is not None]
    lowest = min(compared, key=by_loss, default=None)
    findings = Counter(messages.key(e.main_finding) for _, e in members if e.main_finding is not None)
    return Row(
        low=min(values),
        high=max(values),
        trials=tuple(e.number for _, e in members),
        valued=len(losses),
        best=lowest.value if lowest is not None else None,
        best_trial=lowest.number if lowest is not None else None,
        best_epoch=lowest.record.best_epoch if lowest is not None else None,
        median=median(losses) if losses else None,
        findings=tuple(sorted(findings.items(), key=lambda item: (-item[1], messages.rank(item[0])))),
        verdict=_verdict(name, [e for _, e in members], losses, best, noise),
        level=level(members, compared, best, noise.difference),
        stopped=sum(is_stopped(e) for _, e in members),
    )


def _verdict(
    name: str, members: Sequence[Experiment], losses: Sequence[float], best: Experiment | None, noise: Noise
) -> Verdict:
    """First by what most of the range's trials did, then by its losses against the best of all."""
    # What a trial's own numbers prove to be the dtype's fault says nothing about its other parameters.
    members = [e for e in members if name == "torch_dtype" or not any(f.cause in DTYPE_CAUSES for f in e.findings)]
    if name in RATES and members and all(any(f.cause == "low_rate" for f in e.findings) for e in members):
        return "conservative"  # shown by other trials, however few lie in this range
    if len(members) < FEWEST:
        return "unknown"
    main = [e.main_finding.id for e in members if e.main_finding is not None]
    if 2 * sum(found in AGGRESSIVE for found in main) >= len(members):
        return "aggressive" if name in RATES else "unstable"
    if best is None or best.value is None or len(losses) < FEWEST:
        return "unknown"
    if relative(median(losses), best.value) <= noise.difference:
        return "good"
    if relative(min(losses), best.value) <= noise.difference:
        return "usable"
    return _why_behind(members) if name in RATES else "behind"


def _why_behind(members: Sequence[Experiment]) -> Verdict:
    """Rates are too conservative where most trials' own findings say so; a warmup may have kept them from being
    reached."""
    masked = [e for e in members if e.has(ids.WARMUP_EXCEEDS_TRAINING)]
    if 2 * len(masked) > len(members):
        return "masked"
    low = [e for e in members if any(f.cause in SMALL_STEPS for f in e.findings)]
    return "conservative" if 2 * len(low) > len(members) else "behind"
