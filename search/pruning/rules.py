"""Rules on a trial's own curve, and what they say where they fire. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from search.diagnosis.unstable import JUMP

Losses = Sequence[float | None]
"""A loss by epoch, epoch 1 first; None or NaN where there is no value."""


def rising(val_losses: Losses, patience: int, min_delta: float = 0.0) -> bool:
    """Whether the last `patience` evaluations in a row brought no new best by more than `min_delta`.

    A missing or non-finite value is an evaluation without a new best, so a curve of NaN alone rises too. Small
    gains add up: each is measured against the last value that counted as a best.
    """
    best = math.inf
    waited = 0
    for loss in val_losses:
        if _finite(loss) and loss < best - min_delta:
            best, waited = loss, 0
        else:
            waited += 1
    return waited >= patience


def diverged(train_losses: Losses, val_losses: Losses, jump: float = JUMP) -> bool:
    """Whether training and validation loss both jump up at the latest epoch.

    The training loss is compared with the epoch before, the validation loss with its best so far. A NaN or infinite
    loss at the latest epoch counts as a jump; a missing one (None) does not.
    """
    epoch = max(len(train_losses), len(val_losses))
    if epoch < 2 or len(train_losses) != len(val_losses):
        return False
    before = [loss for loss in train_losses[:-1] if _finite(loss)]
    best = min((loss for loss in val_losses[:-1] if _finite(loss)), default=None)
    return _jumps(train_losses[-1], before[-1] if before else None, jump) and _jumps(val_losses[-1], best, jump)


def describe_rise(val: Losses, patience: int) -> str:
    finite = [(loss, epoch) for epoch, loss in enumerate(val, 1) if _finite(loss)]
    since = ", ".join(_show(loss) for loss in val[-patience:])
    if not finite:
        return f"no finite validation loss in {len(val)} epochs"
    best, epoch = min(finite)
    return f"validation loss has no new best for {patience} epochs: {best:.4f} at epoch {epoch}, lately {since}"


def describe_jump(train: Losses, val: Losses) -> str:
    before = [loss for loss in train[:-1] if _finite(loss)][-1]
    best = min(loss for loss in val[:-1] if _finite(loss))
    return (
        f"both losses jump up at epoch {len(val)}: training {_show(before)} -> {_show(train[-1])}, "
        f"validation {_show(val[-1])} against {_show(best)} at best"
    )


def _show(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"


def _finite(loss: float | None) -> TypeGuard[float]:
    return loss is not None and math.isfinite(loss)


def _jumps(loss: float | None, reference: float | None, jump: float) -> bool:
    if loss is None or reference is None:
        return False
    return not math.isfinite(loss) or loss > reference * (1 + jump)
