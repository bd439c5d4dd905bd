"""How fast a stable loss falls: `not_learning`, `too_slow`, `healthy`, or `inconclusive`."""

from __future__ import annotations

import math
from statistics import fmean, pstdev

from search import records
from search.diagnosis import advise
from search.diagnosis.faults import clipped_fraction
from search.diagnosis.finding import HEALTHY, INCONCLUSIVE, NOT_LEARNING, TOO_SLOW, Advice, Finding, Scalar
from search.diagnosis.noise import (
    SIGNIFICANT,
    best,
    calm,
    limit,
    log_gain,
    relative,
    steady,
    straightness,
    usable,
)
from search.diagnosis.signals import FEWEST_EPOCHS, Signals, ends, losses, rate_evidence

STRAIGHT = 0.75
"""Straightness above which the run has not begun to converge: its second half gains nearly as much per epoch as the
whole. A straight line has 1, the recorded runs and experiment 2 at most 0.56."""
FURTHER = 1.5
"""Factor by which a curve is extrapolated: half as many epochs again, as far as the law was checked."""
LONG_WARMUP = 1 / 3
"""Share of warmup steps above which a slow run's warmup is mentioned."""


def finding(seen: Signals) -> Finding:
    """The one finding about a run whose losses do not fall apart."""
    if max(len(seen.train), len(seen.val)) < FEWEST_EPOCHS:
        return inconclusive(seen)
    return not_learning(seen) or too_slow(seen) or healthy(seen)


def not_learning(seen: Signals) -> Finding | None:
    """Neither loss ever fell by more than noise."""
    for points, noise in ((seen.train, seen.curve.train_noise), (seen.val, seen.curve.val_noise)):
        if points and relative(points[0][1], best(points)[1]) > limit(noise):
            return None
    if steady(seen.val) or _fell_within_first_epoch(seen):
        return None
    rate = seen.curve.peak_rate
    kind = "high_rate" if rate is not None and rate >= advise.HIGH_RATE else "flat"
    if kind == "high_rate":
        moves = advise.lower_rate(seen.curve)
    else:
        # The log's leaf for a loss that does not fall: higher rate, larger rank.
        moves = (*advise.raise_rate(seen.curve), *advise.change_rank(seen.curve, 2))
        moves = (*moves, Advice(action="check", parameter="target_modules"))
    points = seen.train or seen.val
    fall = relative(points[0][1], best(points)[1])
    return Finding(
        id=NOT_LEARNING,
        kind=kind,
        severity="warning",
        epoch=points[0][0],
        evidence=losses(seen) | {"fall": fall} | rate_evidence(seen),
        cause="high_rate" if kind == "high_rate" else None,
        advice=moves,
    )


def _fell_within_first_epoch(seen: Signals) -> bool:
    """Whether the loss fell within the first epoch, whose mean hides it; judged on the steps, where they are known.

    Only a loss well below the first steps', against the steps' own spread, counts.
    """
    losses = [s.loss for s in seen.curve.steps if s.loss is not None and usable(s.loss)]
    n = max(5, len(losses) // 20)
    if len(losses) < 4 * n:
        return False
    first, rest = losses[:n], losses[len(losses) // 2 :]
    error = math.hypot(pstdev(first) / math.sqrt(len(first)), pstdev(rest) / math.sqrt(len(rest)))
    fall = fmean(first) - fmean(rest)
    return fall > SIGNIFICANT * error and fall > limit(seen.curve.val_noise) * abs(fmean(rest))


def too_slow(seen: Signals) -> Finding | None:
    """Still improving at the last epoch, so much that more epochs would make a visible difference."""
    by_val = len(seen.val) >= FEWEST_EPOCHS
    points = calm(seen.val, seen.curve.val_noise) if by_val else calm(seen.train, seen.curve.train_noise)
    # A gain is worth waiting for if the validation loss can show it, whichever curve it is read from.
    noise = seen.curve.val_noise
    last = points[-1][0]
    if best(points) not in points[-2:] or _cut_short(seen):
        return None
    gain = log_gain(points)
    ahead = gain * math.log(FURTHER)
    # Under the log law an epoch's gain is gain / epoch; it is converged when that is half a standard deviation.
    wanted = min(gain / (noise / 2), 1e6)
    straight = straightness(points)
    fell = relative(points[0][1], points[-1][1]) > limit(noise) or steady(points)
    unbent = fell and straight > STRAIGHT
    if not unbent and not (ahead > SIGNIFICANT * noise and wanted > last):
        return None
    evidence: dict[str, Scalar] = losses(seen) | {"gain_ahead": ahead, "per_epoch": gain / last}
    evidence |= {"more_epochs": math.ceil(max(wanted, FURTHER * last)) - last, "straightness": straight}
    evidence["fall"] = -relative(points[-1][1], points[0][1])
    planned, warmup = seen.curve.planned_steps, seen.curve.number("warmup_steps")
    cause: str | None = None
    moves = advise.more_epochs(seen.curve, max(wanted, FURTHER * last))
    if planned is not None and warmup is not None and warmup > LONG_WARMUP * planned[0] > 0:
        cause = "long_warmup"
        evidence |= {"warmup_steps": min(int(warmup), planned[0]), "total_steps": planned[0]}
        shorter = Advice(action="lower", parameter="warmup_steps", before=int(warmup), after=planned[0] // 10)
        moves = (shorter, *moves)
    elif unbent and steady(points):
        # Steps so small that the curve is still a line: the evidence is its shape, whatever the rate's figure.
        larger = (*advise.raise_rate(seen.curve, 3.0), *advise.change_rank(seen.curve, 2))
        cause, moves = ("straight", larger) if larger else (None, moves)
    return Finding(
        id=TOO_SLOW,
        kind="val" if by_val else "train",
        severity="warning",
        epoch=last,
        evidence=evidence | rate_evidence(seen),
        cause=cause,
        advice=moves,
    )


def _cut_short(seen: Signals) -> bool:
    """Whether the run ended before its last epoch: it had no chance to converge, and is not called slow."""
    planned = seen.curve.number("num_epochs")
    return planned is not None and ends(seen)[1] < planned


def inconclusive(seen: Signals) -> Finding:
    """Too few epochs to tell."""
    epochs = len({epoch for epoch, _ in (*seen.train, *seen.val)})
    evidence: dict[str, Scalar] = {"epochs": epochs, "needed": FEWEST_EPOCHS} | (losses(seen) if epochs else {})
    if seen.curve.reason is not None:
        evidence["reason"] = seen.curve.reason
    kind = "none" if epochs == 0 else "few" if seen.train and seen.val else "few_partial"
    planned = seen.curve.number("num_epochs")
    moves: tuple[Advice, ...] = ()
    if seen.curve.reason == records.OUT_OF_MEMORY:
        moves = (Advice(action="lower", parameter="max_target_length"), *advise.change_rank(seen.curve, 0.5))
    elif planned is not None and planned < FEWEST_EPOCHS:
        moves = (Advice(action="raise", parameter="num_epochs", before=int(planned), after=FEWEST_EPOCHS),)
    elif planned is not None and planned < 1e6:
        moves = (Advice(action="finish", parameter="num_epochs", after=int(planned)),)
    return Finding(id=INCONCLUSIVE, kind=kind, severity="info", evidence=evidence, advice=moves)


def healthy(seen: Signals) -> Finding:
    """None of the above: the losses fall or have converged."""
    evidence = losses(seen)
    kind = "falls"
    points = seen.val or seen.train
    if len(points) == 1:
        kind = "once"
    elif best(points)[0] < points[-1][0]:
        kind = "levelled" if best(points)[1] < points[0][1] else "never_fell"
        evidence["since_best"] = points[-1][0] - best(points)[0]
    for move in (*seen.train_moves, *seen.val_moves):
        if move.end is not None:
            evidence |= {"jump_epoch": move.peak[0], "jump_from": move.best[1], "jump_to": move.peak[1]}
            evidence["back_epoch"] = move.end[0]
            break
    clipped = clipped_fraction(seen.curve)
    if clipped is not None:
        evidence["clipped_fraction"] = clipped
    moves: tuple[Advice, ...] = ()
    if _cut_short(seen):
        planned = seen.curve.number("num_epochs")
        evidence["planned_epochs"] = int(planned) if planned is not None and planned < 1e9 else None
        moves = (Advice(action="finish", parameter="num_epochs", after=evidence["planned_epochs"]),)
    name = "val" if seen.val else "train"
    return Finding(
        id=HEALTHY, kind=f"{kind}_{name}", severity="info", evidence=evidence | rate_evidence(seen), advice=moves
    )
