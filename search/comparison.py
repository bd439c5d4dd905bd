"""Studies side by side: what each searched, what it spent and came to, and which configurations they share.

Pure functions of records; `search.compare` reads them and shows the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from search import leaderboard, records
from search.leaderboard import epochs_trained, is_repeat, searched
from search.records import SAMPLE_FIELDS, TrialRecord
from search.space import in_words
from search.verdict import text
from search.verdict.leaders import verdict_of, winner
from trainer.config import default

ENDED = ("COMPLETE", "PRUNED", "FAIL")
HOW = frozenset(
    (
        *("model", "data", "device", "seed", "split_seed", "cache_features", "num_workers", "eval_batch_size"),
        *("micro_batch_size", "max_nonfinite_steps", "skip_bad_rows", "full_data", "split"),
    )
)
"""Fields that say where, how fast or by which random numbers a configuration is trained, not which one it is."""


_UNKNOWN: dict[str, set[Any]] = {"data_fingerprint": {None}, "split": {"auto"}}
"""Values of which it is not known whether they come to the same: `auto` splits by whatever the data have."""


Times = Mapping[int, Mapping[int, float]]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One study as Optuna has it."""

    name: str
    """By which `--study` finds this very generation."""
    definition: Mapping[str, Any]
    attrs: Mapping[str, Any]
    """The study's user attributes."""
    trials: Sequence[TrialRecord]
    times: Times = field(default_factory=dict)
    """When the epochs of each trial were reported, as far as it is known: see `search.reading.epoch_times`."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One study as it compares."""

    name: str
    """By which `--study` finds this very generation."""
    space: dict[str, str]
    """Range by searched field, in words."""
    base: dict[str, Any]
    """Value by field that is not searched."""
    strategy: str | None
    trials: int
    states: dict[str, int]
    epochs: int
    """Trained by the search."""
    repeat_epochs: int
    """Trained by repeats of its leaders."""
    seconds: float | None
    """From the first start of a trial of the search, or report of an epoch, to the last end, breaks included. Trials
    are trained side by side, and wait: a sum of their times is not what a search took."""
    repeat_seconds: float | None
    """The same of the repeats."""
    best_trial: int | None
    best_val_loss: float | None
    """None too where the best trial is that of the highest CIDEr-D."""
    best_cider_d: float | None
    best_epoch: int | None
    best_config: dict[str, Any]
    """Of its searched fields."""
    trials_to_best: int | None
    """Trials that had ended when the best one had."""
    epochs_to_best: int | None
    """Epochs that all trials of the search had trained by then, also those that were paused or running; None where it
    is not known when they were."""
    verdict: str | None
    """In a sentence."""
    chosen_trial: int | None
    """What it has come to: the verdict's trial, else the best."""
    chosen_mean: float | None
    """Mean loss of the chosen trial's repeats, None without any."""
    samples: dict[str, Any]
    """What decides the samples that it validates on, without what it searches; a `max_samples` of None is all rows."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What two studies share."""

    studies: tuple[str, str]
    configurations: int
    """Configurations that both trained."""
    pairs: tuple[tuple[int, int], ...]
    """(trial of the first, trial of the second) with the same configuration."""
    fields: tuple[str, ...]
    """Fields that both search."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two studies or more."""

    sides: tuple[Side, ...]
    overlaps: tuple[Overlap, ...]
    differences: dict[str, list[Any]]
    """By field of the base that is not the same in all: its value in each, None where it is searched or unknown."""
    incomparable: str | None
    """Why the losses do not compare, None if they do."""

    def as_data(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


def compare(studies: Sequence[Recorded]) -> Comparison:
    """Put studies side by side."""
    sides = tuple(map(_side, studies))
    trials = {study.name: searched(study.trials) for study in studies}
    names = list(dict.fromkeys(name for side in sides for name in side.base))
    values = {name: [side.base.get(name) for side in sides] for name in names}
    return Comparison(
        sides=sides,
        overlaps=tuple(_overlap(a, b, trials[a.name], trials[b.name]) for a, b in combinations(sides, 2)),
        differences={name: row for name, row in values.items() if any(value != row[0] for value in row)},
        incomparable=_incomparable(sides),
    )


def _side(study: Recorded) -> Side:
    definition, attrs, trials = study.definition, study.attrs, study.trials
    own = searched(trials)
    repeats = [t for t in trials if is_repeat(t)]
    ended = sorted((t for t in own if t.state in ENDED), key=lambda t: (t.end_s or 0.0, t.number))
    best = leaderboard.best(own)
    score = None if best is None else records.score_of(best.attrs)
    until = [] if best is None else ended[: [t.number for t in ended].index(best.number) + 1]
    verdict = verdict_of(trials, attrs)
    chosen = winner(trials, verdict)
    means = {s.number: s.mean for s in verdict.standings} if verdict is not None else {}
    space = {key: in_words(stored) for key, stored in definition.get("space", {}).items()}
    fingerprints = attrs.get("fingerprints") or {}
    strategy = attrs.get("strategy") or {}
    return Side(
        name=study.name,
        space=space,
        base={key: value for key, value in definition.get("base", {}).items() if key not in space},
        strategy=strategy.get("strategy") if isinstance(strategy, Mapping) else str(strategy),
        trials=len(own),
        states=_counted([leaderboard.state_of(t) for t in own]),
        epochs=epochs_trained(own),
        repeat_epochs=epochs_trained(repeats),
        seconds=_span(own, study.times),
        repeat_seconds=_span(repeats, study.times),
        best_trial=None if best is None else best.number,
        best_val_loss=None if best is None or score is not None else best.value,
        best_cider_d=score,
        best_epoch=None if best is None else best.best_epoch,
        best_config={} if best is None else {key: best.config.get(key) for key in space},
        trials_to_best=len(until) or None,
        epochs_to_best=None if best is None else _epochs_until(best.end_s, own, study.times),
        verdict=None if verdict is None else text.sentence(verdict),
        chosen_trial=None if chosen is None else chosen.number,
        chosen_mean=None if chosen is None else means.get(chosen.number),
        samples={
            **{key: definition.get("base", {}).get(key, default(key)) for key in SAMPLE_FIELDS if key not in space},
            "data_fingerprint": fingerprints.get("data"),
        },
    )


def _epochs_until(end_s: float | None, trials: Sequence[TrialRecord], times: Times) -> int | None:
    """Epochs that were trained until then; None where it is not known of one of them."""
    if end_s is None:
        return None
    found = 0
    for trial in leaderboard.not_taken_up(trials):
        epochs, reported = leaderboard.epochs_of(trial), times.get(trial.number, {})
        if trial.end_s is not None and trial.end_s <= end_s:
            found += epochs
        elif set(range(1, epochs + 1)) <= reported.keys():
            found += sum(reported[epoch] <= end_s for epoch in range(1, epochs + 1))
        else:
            return None
    return found


def _span(trials: Sequence[TrialRecord], times: Times) -> float | None:
    """From the first thing that is known of these trials to the last.

    The start that Optuna has of a trial that was paused is that of its last stretch.
    """
    reported = [at for trial in trials for at in times.get(trial.number, {}).values()]
    known = [at for t in trials for at in (t.start_s, t.end_s) if at is not None] + reported
    return max(known) - min(known) if known else None


def _counted(states: Sequence[str]) -> dict[str, int]:
    return {state: states.count(state) for state in sorted(set(states))}


def _overlap(a: Side, b: Side, ours: Sequence[TrialRecord], theirs: Sequence[TrialRecord]) -> Overlap:
    by_config: dict[str, int] = {}
    for trial in theirs:
        if trial.config and records.RESUMES not in trial.attrs:
            by_config.setdefault(_key(trial.config), trial.number)
    found: dict[str, tuple[int, int]] = {}
    for trial in ours:
        if trial.config and (other := by_config.get(_key(trial.config))) is not None:
            found.setdefault(_key(trial.config), (trial.number, other))
    return Overlap(
        studies=(a.name, b.name),
        configurations=len(found),
        pairs=tuple(found.values()),
        fields=tuple(name for name in a.space if name in b.space),
    )


def _key(config: Mapping[str, Any]) -> str:
    return repr(sorted((name, value) for name, value in config.items() if name not in HOW))


def _incomparable(sides: Sequence[Side]) -> str | None:
    """Why losses of these studies do not compare, if they do not: the first two of which it is known."""
    for first, second in combinations(sides, 2):
        both = [name for name in first.samples if name in second.samples]
        known = [name for name in both if not {first.samples[name], second.samples[name]} & _UNKNOWN.get(name, set())]
        other = [name for name in known if first.samples[name] != second.samples[name]]
        if other:
            fields = ", ".join(name.replace("data_fingerprint", "data") for name in other)
            return f"{first.name} and {second.name} validate on different samples ({fields})"
    return None


def rows(found: Comparison) -> list[tuple[str, list[str]]]:
    """The comparison as (what, its value in each study)."""
    table: list[tuple[str, list[str]]] = []

    def row(what: str, values: Sequence[Any]) -> None:
        table.append((what, ["-" if value in (None, "") else str(value) for value in values]))

    sides = found.sides
    row("best val_loss", [None if s.best_val_loss is None else f"{s.best_val_loss:.4f}" for s in sides])
    if any(s.best_cider_d is not None for s in sides):
        row("best CIDEr-D", [None if s.best_cider_d is None else f"{s.best_cider_d:.4f}" for s in sides])
    row("best trial", [s.best_trial for s in sides])
    row("at epoch", [s.best_epoch for s in sides])
    row("chosen trial", [s.chosen_trial for s in sides])
    row("mean of its repeats", [None if s.chosen_mean is None else f"{s.chosen_mean:.4f}" for s in sides])
    row("trials", [s.trials for s in sides])
    for state in sorted({state for s in sides for state in s.states}):
        row(f"  {state}", [s.states.get(state, 0) for s in sides])
    row("epochs of the search", [s.epochs for s in sides])
    row("epochs of repeats", [s.repeat_epochs for s in sides])
    row("trials to the best", [s.trials_to_best for s in sides])
    row("epochs to the best", [s.epochs_to_best for s in sides])
    row("first start to last end", [_time(s.seconds) for s in sides])
    row("the same of repeats", [_time(s.repeat_seconds) for s in sides])
    row("strategy", [s.strategy for s in sides])
    for name in dict.fromkeys(name for s in sides for name in s.space):
        row(f"search {name}", [s.space.get(name, f"fixed: {s.base.get(name, '-')}") for s in sides])
    for name in dict.fromkeys(name for s in sides for name in s.best_config):
        row(f"best {name}", [_shown(name, s) for s in sides])
    for name, values in found.differences.items():
        if not any(name in s.space for s in sides):
            row(f"base {name}", values)
    return table


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.0f} s"


def _shown(name: str, side: Side) -> str | None:
    value = side.best_config.get(name, side.base.get(name))
    return None if value is None else leaderboard.show_value(name, value)


def sentences(found: Comparison) -> list[str]:
    """What the table cannot say: verdicts, what the studies share, and whether their losses compare."""
    lines = [f"{side.name}: {side.verdict}" for side in found.sides if side.verdict is not None]
    for overlap in found.overlaps:
        a, b = overlap.studies
        same = ", ".join(f"{ours} = {theirs}" for ours, theirs in overlap.pairs[:12])
        count = overlap.configurations
        shared = f"{count} configuration{'s' if count != 1 else ''} in both" + (f" (trials {same})" if same else "")
        lines.append(f"{a} and {b}: {shared}; both search {', '.join(overlap.fields) or 'no field'}")
    unknown = [side.name for side in found.sides if side.best_trial is not None and side.epochs_to_best is None]
    if unknown:
        lines.append(f"epochs to the best of {', '.join(unknown)}: not known; MLflow has no time of some epochs")
    if found.incomparable is not None:
        lines.append(f"the losses do not compare: {found.incomparable}")
    return lines
