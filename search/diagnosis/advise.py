"""What to try next, with values: the hand-run log's own moves, applied to the configuration at hand."""

from __future__ import annotations

import math

from search.diagnosis.curve import Curve
from search.diagnosis.finding import Advice

START_RATE = 2e-4
"""The log's recommended start, reached from 5e-6 and from 1e-3 alike."""
LOW_RATE = 1e-4
"""A rate below this counts as low. The log calls 5e-6 too conservative; 1e-4 is the lowest at which a recorded run
trained well."""
HIGH_RATE = 5e-4
"""A rate from this one upwards counts as high: "fast, but may be unstable" in the log's table. Recorded runs at 5e-4
were stable, the one at 8e-4 ended with both losses rising, the log's at 1e-3 diverged."""
LEAST_RANK = 4
MOST_DROPOUT = 0.2
"""Edges of the log's ranges."""
FLOAT16_EPSILON = 1e-4
"""Large enough for float16: AdamW's second moment is a square, which float16 rounds to 0 below a gradient of about
2e-4, and then the step is gradient / eps: with 1e-4 it stays near 1 where 1e-6 would make it 200."""


def lower_rate(curve: Curve) -> tuple[Advice, ...]:
    """Lower the rate: to the log's start from twice that and above, else to half."""
    rate = curve.number("learning_rate")
    if rate is None or rate <= 0:
        return (Advice(action="lower", parameter="learning_rate"),)
    after = START_RATE if rate >= 2 * START_RATE else rate / 2
    return (Advice(action="lower", parameter="learning_rate", before=rate, after=after),)


def raise_rate(curve: Curve, factor: float = 2.0) -> tuple[Advice, ...]:
    """Raise the rate: a low one to the log's start, else times the factor; never into or within the high rates."""
    rate = curve.number("learning_rate")
    if rate is None or rate <= 0:
        return (Advice(action="raise", parameter="learning_rate"),)
    if rate >= HIGH_RATE:
        return ()
    after = START_RATE if rate < LOW_RATE else min(rate * factor, HIGH_RATE)
    return (Advice(action="raise", parameter="learning_rate", before=rate, after=float(f"{after:.2g}")),)


def change_rank(curve: Curve, factor: float) -> tuple[Advice, ...]:
    """Multiply the rank by the factor, and alpha with it: updates are scaled by alpha / r, so the rank alone would
    change their size."""
    rank = curve.number("lora_r")
    if rank is None or not 1 <= rank <= 1024:
        return (Advice(action="lower" if factor < 1 else "raise", parameter="lora_r"),)
    after = max(LEAST_RANK, int(rank * factor)) if factor < 1 else min(32, int(rank * factor))
    if (after >= rank) if factor < 1 else (after <= rank):
        return ()
    moves = [Advice(action="lower" if factor < 1 else "raise", parameter="lora_r", before=int(rank), after=after)]
    alpha = curve.number("lora_alpha")
    if alpha is not None:
        scaled = float(f"{alpha * after / rank:.4g}")
        number = int(scaled) if scaled.is_integer() else scaled
        moves.append(Advice(action="keep_ratio", parameter="lora_alpha", before=alpha, after=number))
    return tuple(moves)


def more_dropout(curve: Curve) -> tuple[Advice, ...]:
    """Raise dropout to 0.1, the log's recommendation, and from there in steps of 0.05 to the edge of its range."""
    dropout = curve.number("lora_dropout")
    if dropout is None or not 0 <= dropout < 1:
        return (Advice(action="raise", parameter="lora_dropout"),)
    if dropout >= MOST_DROPOUT:
        return ()
    after = 0.1 if dropout < 0.1 else round(min(MOST_DROPOUT, dropout + 0.05), 3)
    return (Advice(action="raise", parameter="lora_dropout", before=dropout, after=after),)


def regularise(curve: Curve) -> tuple[Advice, ...]:
    """Moves against oscillation and overfitting, in the log's order: lower rate, smaller rank, more dropout."""
    return (*lower_rate(curve), *change_rank(curve, 0.5), *more_dropout(curve))


def more_epochs(curve: Curve, wanted: float) -> tuple[Advice, ...]:
    """Train longer, at most twice as long: the law behind `wanted` was checked up to half as many epochs again."""
    epochs = curve.number("num_epochs") or curve.last_epoch
    if epochs < 1:
        return ()
    after = min(math.ceil(wanted), 2 * int(epochs))
    if after <= epochs:
        return ()
    return (Advice(action="raise", parameter="num_epochs", before=int(epochs), after=after),)
