"""Loss curves that fall apart: `diverged`, `oscillating`, `overfitting`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from search import records
from search.diagnosis import advise
from search.diagnosis.finding import DIVERGED, OSCILLATING, OVERFITTING, Advice, Finding, Scalar
from search.diagnosis.noise import Excursion, best, limit, relative
from search.diagnosis.signals import FEWEST_EPOCHS, Signals, high_rate, rate_evidence

GIVEN_BACK = 0.5
"""A run has diverged if it gave back half of what it had gained. Experiment 3 gave back 90 % in one epoch, the
recorded run whose losses rose at the end 11 %."""
JUMP = 0.05
"""A diverged run also ends at least this share above its best. It is the pruner's bound too: there both losses must
rise by more than this at one epoch.

Recorded runs (tests/data/recorded-runs.json): over 96 epochs of healthy training the only one at which both losses
rise is grid_v1's epoch 6, training +1.6 %, validation +1.3 % over its best; alone, validation rises by at most 0.6 %
otherwise. The hand-run log's experiment 3 jumps from 1.69 to 1.87, +10.7 %. 5 % is three times the largest healthy
rise and half of the one that was a real divergence.
"""


def findings(seen: Signals) -> tuple[Finding, ...]:
    """What is wrong with the course of the losses; empty if nothing is.

    A run that ends with both losses up is not also called overfitting, by figures of the epochs before: that the
    validation loss left its best first is told with the divergence.
    """
    found = diverged(seen) or oscillating(seen)
    over = overfitting(seen)
    if found is not None and (found.id == DIVERGED or found.kind == "rising"):
        return (_with_onset(found, over),)
    return tuple(f for f in (found, over) if f is not None)


def _with_onset(finding: Finding, over: Finding | None) -> Finding:
    """The finding of a training loss that ends up, with the epoch at which the validation loss left its best."""
    if over is None:
        return finding
    names = {
        "val_best": "val_best",
        "best_epoch": "val_best_epoch",
        "val_onset": "val_onset",
        "epoch": "val_onset_epoch",
    }
    evidence = {new: over.evidence[name] for name, new in names.items()}
    stop = tuple(advice for advice in over.advice if advice.action == "stop_at_best")
    return replace(finding, evidence={**finding.evidence, **evidence}, advice=(*finding.advice, *stop))


def diverged(seen: Signals) -> Finding | None:
    """Both losses left their best, and the training loss gave back much of what it had gained."""
    move, points = seen.train_open, seen.train
    if move is None:
        return _stopped_as_diverged(seen)
    gain, lost = points[0][1] - move.best[1], points[-1][1] - move.best[1]
    given_back = lost / gain if gain > 0 else None  # nothing to give back: it never fell below its first value
    up = relative(points[-1][1], move.best[1])
    val_after = [value for epoch, value in seen.val if epoch >= move.start[0]]
    doubted = not _stays_up(seen, move) if val_after else len(points) < FEWEST_EPOCHS
    if (given_back is not None and given_back < GIVEN_BACK) or up < JUMP or doubted:
        return _stopped_as_diverged(seen)
    since = [value for epoch, value in points if epoch >= move.start[0]]
    flat = len(since) > 1 and relative(max(since), min(since)) < 2 * limit(seen.curve.train_noise)
    evidence: dict[str, Scalar] = {
        "epoch": move.start[0],
        "train_before": move.best[1],
        "train_at": move.start[1],
        "train_last": points[-1][1],
        "last_epoch": points[-1][0],
        "best_epoch": move.best[0],
        "rise": up,
    }
    if given_back is not None:
        evidence["given_back"] = min(given_back, 1e6)
    jump = "jump" if given_back is not None else "jump_from_first"
    before = [p for p in seen.val if p[0] < move.start[0]]
    if val_after and before:
        evidence |= {"val_before": best(tuple(before))[1], "val_last": val_after[-1]}
    return Finding(
        id=DIVERGED,
        kind="plateau" if flat else jump if len(since) == 1 else "rise",
        severity="error",
        epoch=move.start[0],
        evidence=evidence | rate_evidence(seen),
        cause="high_rate" if high_rate(seen) else None,
        advice=advise.regularise(seen.curve),
    )


def _stays_up(seen: Signals, move: Excursion) -> bool:
    """Whether the validation loss, too, ends above its earlier best by more than noise."""
    before = [value for epoch, value in seen.val if epoch < move.start[0]]
    return not before or relative(seen.val[-1][1], min(before)) > limit(seen.curve.val_noise)


def _stopped_as_diverged(seen: Signals) -> Finding | None:
    """The finding of a run stopped as diverged by the pruner's one-epoch rule; its last epoch is the evidence."""
    train, val = seen.train, seen.val
    if seen.curve.reason != records.DIVERGED or len(train) < 2:
        return None
    evidence: dict[str, Scalar] = {"epoch": train[-1][0], "train_before": train[-2][1], "train_last": train[-1][1]}
    if len(val) > 1:
        evidence |= {"val_before": best(val[:-1])[1], "val_last": val[-1][1]}
    return Finding(
        id=DIVERGED,
        kind="stopped",
        severity="error",
        epoch=train[-1][0],
        evidence=evidence | rate_evidence(seen),
        cause="high_rate" if high_rate(seen) else None,
        advice=advise.regularise(seen.curve),
    )


def oscillating(seen: Signals) -> Finding | None:
    """The training loss ends above its best by more than noise, or a loss went up and came back more than once."""
    move = seen.train_open
    fell = bool(seen.train) and -relative(best(seen.train)[1], seen.train[0][1]) > limit(seen.curve.train_noise)
    evidence: dict[str, Scalar]
    if move is not None and fell and len(seen.train) >= FEWEST_EPOCHS:
        up = relative(seen.train[-1][1], move.best[1])
        evidence = {"epoch": move.start[0], "last_epoch": seen.train[-1][0], "best_epoch": move.best[0]}
        evidence |= {"train_before": move.best[1], "train_last": seen.train[-1][1], "rise": up}
        if seen.val and seen.val[-1][0] >= move.start[0] and seen.val[-1][1] > best(seen.val)[1]:
            evidence |= {"val_before": best(seen.val)[1], "val_last": seen.val[-1][1]}
        return _oscillation(seen, "rising", move.start[0], evidence)
    for name, moves in (("train", seen.train_moves), ("val", seen.val_moves)):
        returned = [m for m in moves if m.end is not None]
        if len(returned) < 2:
            continue
        highest = max(returned, key=lambda m: relative(m.peak[1], m.best[1]))
        evidence = {"times": len(returned), "peak_epoch": highest.peak[0], "peak": highest.peak[1]}
        evidence |= {"before": highest.best[1], "rise": relative(highest.peak[1], highest.best[1])}
        return _oscillation(seen, f"swinging_{name}", returned[0].start[0], evidence)
    return None


def _oscillation(seen: Signals, kind: str, epoch: int, evidence: dict[str, Scalar]) -> Finding:
    return Finding(
        id=OSCILLATING,
        kind=kind,
        severity="warning",
        epoch=epoch,
        evidence=evidence | rate_evidence(seen),
        cause="high_rate" if high_rate(seen) else None,
        advice=advise.regularise(seen.curve),
    )


def overfitting(seen: Signals) -> Finding | None:
    """The validation loss rises for good while the training loss does not."""
    up = seen.val_rise
    if up is None or len(seen.val) < FEWEST_EPOCHS:
        return None
    move = seen.train_open
    if move is not None and move.start[0] <= up.onset[0]:
        return None  # both rise together: that is not overfitting
    until = [p for p in seen.train if move is None or p[0] < move.start[0]]
    at_best = [value for epoch, value in until if epoch <= up.best[0]]
    evidence: dict[str, Scalar] = {
        "epoch": up.onset[0],
        "val_best": up.best[1],
        "best_epoch": up.best[0],
        "val_onset": up.onset[1],
        "val_last": up.last[1],
        "last_epoch": up.last[0],
        "rise": relative(up.last[1], up.best[1]),
    }
    kind = "val_only"
    if at_best and until[-1][0] > up.best[0]:
        kind = "falling" if until[-1][1] < at_best[-1] else "flat"
        evidence |= {"train_at_best": at_best[-1], "train_last": until[-1][1]}
    return Finding(
        id=OVERFITTING,
        kind=kind,
        severity="warning",
        epoch=up.onset[0],
        evidence=evidence | rate_evidence(seen),
        advice=(
            *advise.regularise(seen.curve),
            Advice(action="stop_at_best", parameter="num_epochs", after=up.best[0]),
        ),
    )


def with_cause(findings: Iterable[Finding], cause: str) -> tuple[Finding, ...]:
    """The findings with this cause for a divergence: a measurement counts more than what the rate suggests."""
    return tuple(replace(f, cause=cause) if f.id == DIVERGED else f for f in findings)
