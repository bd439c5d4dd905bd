"""What the trials say together: budget, health, decision tree, recommended configuration, lessons. Facts only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb

from search import records
from search.diagnosis import Finding, messages
from search.diagnosis import finding as ids
from search.diagnosis.messages import STILL_FALLING
from search.diagnosis.noise import relative
from search.diagnosis.tree import LEAVES
from search.records import TrialRecord
from search.report.experiment import UNFINISHED, Experiment, by_loss, own_cost
from search.report.importance import Importance
from search.report.measured_noise import Noise
from search.report.parameters import AGGRESSIVE, BROKEN, DTYPE_CAUSES

LOSING = (records.NON_FINITE, records.OUT_OF_MEMORY, records.DIVERGED, records.LOST, records.ERROR)
"""Reasons for which the epochs of a trial were wasted."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Trials, epochs and time saved or lost for one reason; `seconds` is None where nothing was timed."""

    reason: str
    trials: tuple[int, ...]
    epochs: int
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the study cost, what early stopping saved, what failures cost."""

    epochs: int
    seconds: float
    again: tuple[int, float]
    """(epochs, seconds) of the repeats, which the others do not count."""
    saved: tuple[Share, ...]
    """Planned epochs that were not run; their time by each trial's own median epoch."""
    lost: tuple[Share, ...]


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One sign of health or trouble, and the trials that show it."""

    name: str
    yes: tuple[int, ...]
    no: tuple[int, ...]
    unknown: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Recommended:
    """The best trial, and how far it is from the next."""

    best: Experiment
    runner_up: Experiment | None
    """The second best on the same samples."""
    gap: float | None
    """How far the runner-up lies behind, a share of the loss."""
    within_noise: tuple[int, ...]
    """Trials whose loss cannot be told apart from the best's, by `Noise.difference`."""
    compared: int
    """Trials on the same samples that have a loss."""
    elsewhere: tuple[int, ...]
    """Trials validated on different samples, with which it was not compared."""


def budget(experiments: Sequence[Experiment], repeats: Sequence[TrialRecord] = ()) -> Budget:
    """Epochs and time: in total, of the repeats, saved and lost."""
    by_number = {trial.number: trial for trial in repeats}
    again = [own_cost(trial, by_number.get(trial.attrs.get(records.RESUMES, -1))) for trial in repeats]
    saved: list[Share] = []
    lost: list[Share] = []
    for reason in records.SAVING:
        stopped = [e for e in experiments if e.record.reason == reason and e.record.state in ("COMPLETE", "PRUNED")]
        left = [(e, max(0, e.planned_epochs - len(e.rows))) for e in stopped]
        _add(saved, reason, [(e, n, None if e.epoch_seconds is None else n * e.epoch_seconds) for e, n in left])
    for reason in LOSING:
        failed = [e for e in experiments if e.record.reason == reason and e.record.state not in UNFINISHED]
        # The epochs of a lost trial up to its checkpoint are not repeated by its successor.
        bad = [e for e in failed if e.record.state == "FAIL" or e.record.violated or reason == records.DIVERGED]
        _add(lost, reason, [(e, e.own_epochs, e.seconds) for e in bad if e.resumed_by is None])
    return Budget(
        epochs=sum(e.own_epochs for e in experiments),
        seconds=sum(e.seconds or 0.0 for e in experiments),
        again=(sum(epochs for epochs, _ in again), sum(seconds or 0.0 for _, seconds in again)),
        saved=tuple(saved),
        lost=tuple(lost),
    )


def _add(shares: list[Share], reason: str, parts: Sequence[tuple[Experiment, int, float | None]]) -> None:
    if not parts:
        return
    times = [seconds for _, _, seconds in parts if seconds is not None]
    shares.append(
        Share(
            reason=reason,
            trials=tuple(e.number for e, _, _ in parts),
            epochs=sum(epochs for _, epochs, _ in parts),
            seconds=sum(times) if times else None,
        )
    )


def _sign(experiments: Sequence[Experiment], name: str, judge: Callable[[Experiment], bool | None]) -> Sign:
    judged = [(e.number, judge(e)) for e in experiments if e.findings]
    return Sign(
        name=name,
        yes=tuple(n for n, verdict in judged if verdict is True),
        no=tuple(n for n, verdict in judged if verdict is False),
        unknown=tuple(n for n, verdict in judged if verdict is None),
    )


def _train_falls(e: Experiment) -> bool | None:
    """Whether the training loss fell, and the diagnosis saw neither a broken run nor oscillation."""
    rows = [row for row in e.rows if row.train_loss is not None]
    if e.has(ids.OSCILLATING, *BROKEN):
        return False
    if len(rows) < 2:
        return None
    return (rows[-1].train_loss or 0) < (rows[0].train_loss or 0)


def _val_follows(e: Experiment) -> bool | None:
    """Whether the validation loss fell, and did not leave its best for good."""
    rows = [row for row in e.rows if row.val_loss is not None]
    if e.has(ids.OVERFITTING, *BROKEN):
        return False
    if len(rows) < 2:
        return None
    return (rows[-1].val_loss or 0) < (rows[0].val_loss or 0)


def _gradients_stable(e: Experiment) -> bool | None:
    if e.has(ids.EXPLODING_GRADIENT, ids.NON_FINITE):
        return False
    known = any(step.grad_norm is not None for step in e.record.steps) or any(
        row.record.grad_norm_max is not None for row in e.rows
    )
    return True if known else None


def health(experiments: Sequence[Experiment]) -> tuple[Sign, ...]:
    """The hand-run log's four signs of health."""
    return (
        _sign(experiments, "train_falls", _train_falls),
        _sign(experiments, "val_follows", _val_follows),
        _sign(experiments, "finite", lambda e: not e.has(ids.NON_FINITE)),
        _sign(experiments, "gradients_stable", _gradients_stable),
    )


def trouble(experiments: Sequence[Experiment]) -> tuple[Sign, ...]:
    """The hand-run log's four signs of trouble, and two signs of a plan that cannot work."""
    signs: Mapping[str, tuple[str, ...]] = {
        "train_rises": (ids.OSCILLATING, ids.DIVERGED),
        "val_rises": (ids.OVERFITTING,),
        "exploding": (ids.EXPLODING_GRADIENT,),
        "too_slow": (ids.TOO_SLOW, ids.NOT_LEARNING),
        "warmup": (ids.WARMUP_EXCEEDS_TRAINING,),
        "slow_epoch": (ids.SLOW_EPOCH,),
    }

    def shows(name: str, wanted: tuple[str, ...]) -> Callable[[Experiment], bool]:
        # A diverged run whose validation loss rose first has that in its finding.
        rose = name == "val_rises"
        return lambda e: e.has(*wanted) or (rose and any("val_onset_epoch" in f.evidence for f in e.findings))

    return tuple(_sign(experiments, name, shows(name, wanted)) for name, wanted in signs.items())


def tree(experiments: Sequence[Experiment]) -> dict[str, tuple[int, ...]]:
    """The trials in each leaf of the decision tree."""
    return {
        name: tuple(e.number for e in experiments if e.leaf is not None and e.leaf.name == name) for name in LEAVES
    }


def recommended(experiments: Sequence[Experiment], noise: Noise) -> Recommended | None:
    """The COMPLETE trial with the lowest validation loss, as in the leaderboard; None if none is complete."""
    complete = [e for e in experiments if e.record.state == "COMPLETE" and e.value is not None]
    ordered = sorted(complete, key=by_loss)
    if not ordered:
        return None
    best = ordered[0]
    same = [e for e in ordered[1:] if e.samples == best.samples]
    gaps = [(relative(e.value or 0.0, best.value or 0.0), e) for e in same]
    return Recommended(
        best=best,
        runner_up=same[0] if same else None,
        gap=gaps[0][0] if gaps else None,
        within_noise=tuple(e.number for gap, e in gaps if gap <= noise.difference),
        compared=1 + len(same),
        elsewhere=tuple(sorted(e.number for e in ordered if e.samples != best.samples)),
    )


@dataclass(frozen=True, kw_only=True)
class Dtype:
    """Results of one dtype."""

    name: str
    trials: int
    broke: int
    shown: tuple[int, Finding] | None
    """(trial, finding) of the first trial in which the dtype itself is shown to be the cause: one such run says more
    than a count."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What this study says about the hand-run log's three lessons."""

    judged: int
    broke: tuple[int, ...]
    """Trials with NaN, exploding gradients or divergence."""
    dtypes: tuple[Dtype, ...]
    overfitted: tuple[int, ...]
    short: tuple[int, ...]
    """Trials that lacked nothing but epochs."""
    warmup: tuple[int, ...]
    """Trials whose warmup was longer than their training."""
    late: tuple[int, ...]
    """Trials whose epoch of lowest training loss was worse in validation than the best by more than one deviation of
    noise: the training loss alone would have chosen the wrong epoch."""
    high_rate: float
    """Learning rates from this one upwards count as high."""
    high: tuple[int, int]
    """(trials that were too aggressive, trials) at high learning rates."""
    low: tuple[int, int]
    """The same at lower learning rates."""
    chance: float
    """How often as many of the aggressive ones have a high rate if the rate has nothing to do with it."""


def lessons(experiments: Sequence[Experiment], high_rate: float) -> Lessons:
    """Counts for the three lessons."""
    judged = [e for e in experiments if e.findings]
    broke = tuple(e.number for e in judged if e.has(*BROKEN))
    rates = [(e.record.config.get("learning_rate"), e.has(*AGGRESSIVE)) for e in judged]
    high = [bad for rate, bad in rates if rate is not None and rate >= high_rate]
    low = [bad for rate, bad in rates if rate is not None and rate < high_rate]
    return Lessons(
        judged=len(judged),
        broke=broke,
        dtypes=_dtypes(judged),
        overfitted=tuple(e.number for e in judged if e.has(ids.OVERFITTING)),
        short=tuple(e.number for e in judged if e.main_finding and messages.key(e.main_finding) == STILL_FALLING),
        warmup=tuple(e.number for e in judged if e.has(ids.WARMUP_EXCEEDS_TRAINING)),
        late=tuple(e.number for e in judged if _misled(e)),
        high_rate=high_rate,
        high=(sum(high), len(high)),
        low=(sum(low), len(low)),
        chance=_chance(sum(high), len(high), sum(low), len(low)),
    )


def _chance(bad_high: int, high: int, bad_low: int, low: int) -> float:
    """Fisher's exact test, one-sided."""
    bad, all_ = bad_high + bad_low, high + low
    ways = sum(comb(high, k) * comb(low, bad - k) for k in range(bad_high, min(bad, high) + 1))
    return ways / comb(all_, bad)


def _dtypes(judged: Sequence[Experiment]) -> tuple[Dtype, ...]:
    found = []
    for name in sorted({str(e.record.config.get("torch_dtype")) for e in judged}):
        mine = [e for e in judged if str(e.record.config.get("torch_dtype")) == name]
        proven = ((e.number, f) for e in mine for f in e.findings if f.cause in DTYPE_CAUSES)
        broke = sum(e.has(*BROKEN) for e in mine)
        found.append(Dtype(name=name, trials=len(mine), broke=broke, shown=next(proven, None)))
    return tuple(found)


def _misled(e: Experiment) -> bool:
    rows = [row for row in e.rows if row.train_loss is not None and row.val_loss is not None]
    if len(rows) < 2 or e.has(*BROKEN):
        return False
    lowest_train = min(rows, key=lambda row: row.train_loss or 0.0)
    return lowest_train.val_rise is not None


RATE_PARAMS = ("learning_rate", "warmup_steps", "batch_size")


def strategy(importances: Sequence[Importance]) -> tuple[str, ...]:
    """The order of tuning: the hand-run log's, with the second and third step exchanged if the importances say so."""
    rate = sum(i.share for i in importances if i.name in RATE_PARAMS)
    capacity = sum(i.share for i in importances if i.name.startswith("lora_"))
    middle = ("capacity", "rate") if capacity > rate else ("rate", "capacity")
    return ("stability", *middle, "overfitting")
