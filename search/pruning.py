"""When a trial stops before its last epoch: rules on its own curve, and Optuna's pruners that compare with others.

    rising     no new best validation loss for `patience` evaluations in a row
    diverged   training and validation loss jump up at the same epoch
    verdict    what the rule that fired makes of the trial: PRUNED, or COMPLETE with what it had reached

Optuna's own pruners cannot do this: Median, Hyperband and SuccessiveHalving never stop a rising trial that is still
the best of its study, and PatientPruner never stops a curve of NaN (measured with Optuna 5.0).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search import records
from search.errors import StudyError
from trainer.common.errors import nearest
from trainer.config import TrainConfig

JUMP = 0.05
"""Both losses must rise by more than this share at one epoch to count as divergence.

Recorded runs (tests/data/recorded-runs.json): over 96 epochs of healthy training the only one at which both losses
rise is grid_v1's epoch 6, training +1.6 %, validation +1.3 % over its best; alone, validation rises by at most 0.6 %
otherwise. The hand-run log's experiment 3 jumps from 1.69 to 1.87, +10.7 %. 5 % is three times the largest healthy
rise and half of the one that was a real divergence.
"""

MIN_PEERS = 3
"""Finished trials needed before "no better than their median" says anything.

Of one or two trials the median is an extreme, or the mean of both extremes: one lucky first trial would turn every
overfitting trial after it into a PRUNED one. With three it is a value with one on either side.
"""

PRUNERS = ("rising", "hyperband", "halving", "median", "none")
"""Names that `make_pruner` knows."""

Losses = Sequence[float | None]
"""A loss by epoch, epoch 1 first; None or NaN where there is no value."""


@dataclass(frozen=True)
class Verdict:
    """A trial stops now, and this is what it is told as."""

    stop: bool
    state: Literal["COMPLETE", "PRUNED"]
    """COMPLETE with its best value (`stopped_early`), so that a record is not thrown away, or PRUNED."""
    reason: str
    """`records.RISING`, `records.DIVERGED`, `records.NON_FINITE` or `records.SUPERSEDED`."""
    detail: str
    """The values and epochs that show it, in words."""


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

    The training loss is compared with the epoch before, the validation loss with its best so far. Where one of
    them is NaN or infinite at the latest epoch, that counts as its jump; where it is missing (None), nothing is known.
    """
    epoch = max(len(train_losses), len(val_losses))
    if epoch < 2 or len(train_losses) != len(val_losses):
        return False
    before = [loss for loss in train_losses[:-1] if _finite(loss)]
    best = min((loss for loss in val_losses[:-1] if _finite(loss)), default=None)
    return _jumps(train_losses[-1], before[-1] if before else None, jump) and _jumps(val_losses[-1], best, jump)


def best_value(trial: FrozenTrial) -> float | None:
    """The lowest finite validation loss of a trial: its value if COMPLETE, else of what it reported."""
    if trial.state == TrialState.COMPLETE:
        return trial.value
    return min((v for v in trial.intermediate_values.values() if math.isfinite(v)), default=None)


def _finite(loss: float | None) -> TypeGuard[float]:
    return loss is not None and math.isfinite(loss)


def _jumps(loss: float | None, reference: float | None, jump: float) -> bool:
    if loss is None or reference is None:
        return False
    return not math.isfinite(loss) or loss > reference * (1 + jump)


class HalvingPruner(SuccessiveHalvingPruner):
    """Successive halving that takes a promotion back once enough other trials have come to the same rung.

    Optuna's (ASHA, Li et al. 2018) judges a trial once, among those that were at the rung before it: of trials that
    are trained side by side the first to arrive go on to the end whatever the others reach. Here every rung behind a
    trial is looked at again after each epoch. One after the other, where the field does not grow meanwhile, it is
    Optuna's.

    Args:
        min_resource: Epoch of the first rung.
        reduction_factor: One trial of so many goes on; the next rung is so many times later.
    """

    def __init__(self, min_resource: int = 1, reduction_factor: int = 3) -> None:
        super().__init__(min_resource=min_resource, reduction_factor=reduction_factor)
        self._one_of = reduction_factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial should stop now: at a rung, or because of what others have reached at one behind it."""
        if super().prune(study, trial):
            return True
        trials = study.get_trials(deepcopy=False)
        sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
        rung = 0
        # As the storage has them now: the call above has noted the rung that the trial has just passed.
        reached = trials[trial.number].system_attrs
        while (key := f"completed_rung_{rung}") in reached:
            field = sorted(sign * each.system_attrs[key] for each in trials if key in each.system_attrs)
            if sign * reached[key] > field[max(len(field) // self._one_of, 1) - 1]:
                return True
            rung += 1
        return False


class RisingLossPruner(BasePruner):
    """Stops a trial whose validation loss rises or whose losses diverge, or that another pruner gives up.

    Reads the trial's own reports (`trial.report(val_loss, step=epoch)`, NaN allowed) and its user attribute
    `records.TRAIN_LOSSES`. Other trials are read only once a trial would stop, never at a healthy epoch.

    Args:
        patience:
            Evaluations in a row without a new best before the loss counts as rising. A trial whose resolved
            configuration is recorded (`records.CONFIG`) is held to its own `patience` and `min_delta`.
        min_delta:
            A validation loss is a new best if it is lower by more than this.
        min_peers:
            Finished trials with a value that it takes to compare with their median.
        other:
            A pruner that is asked when neither rule fires, e.g. `optuna.pruners.HyperbandPruner`.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        *,
        patience: int = 3,
        min_delta: float = 0.0,
        min_peers: int = MIN_PEERS,
        other: BasePruner | None = None,
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, but got {patience=}.")
        if not min_delta >= 0:
            raise ValueError(f"min_delta cannot be negative, but got {min_delta=}.")
        if min_peers < 1:
            raise ValueError(f"min_peers must be at least 1, but got {min_peers=}.")
        self._patience = patience
        self._min_delta = min_delta
        self._min_peers = min_peers
        self._other = other

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial should stop now. `verdict` says as what."""
        return self.verdict(study, trial) is not None

    def verdict(self, study: optuna.Study, trial: FrozenTrial) -> Verdict | None:
        """What ends the trial at its latest epoch, or None to go on.

        Args:
            study: The study whose finished trials are the peers.
            trial: The running trial as the storage has it, its latest epoch reported.

        Returns:
            PRUNED at once for divergence; for a rising loss PRUNED if its best is no better than the peers' median,
            else COMPLETE; PRUNED if the other pruner gives it up; None otherwise.
        """
        if not trial.intermediate_values:
            return None
        train, val = _curves(trial)
        config = trial.user_attrs.get(records.CONFIG, {})
        patience = config.get("patience", self._patience)
        if diverged(train, val):
            return Verdict(True, "PRUNED", records.DIVERGED, _describe_jump(train, val))
        if rising(val, patience, config.get("min_delta", self._min_delta)):
            return self._judge_rising(study, trial, val, patience)
        if self._other is not None and self._other.prune(study, trial):
            return _superseded(self._other, trial)
        return None

    def _judge_rising(self, study: optuna.Study, trial: FrozenTrial, val: Losses, patience: int) -> Verdict:
        shown = _describe_rise(val, patience)
        best = best_value(trial)
        peers = _peer_values(study, trial)
        if best is None:  # a cliff that TPE is to learn of, not a curve that rises
            return Verdict(True, "PRUNED", records.NON_FINITE, shown)
        if len(peers) < self._min_peers:
            number = f"{len(peers)} finished trial" + ("" if len(peers) == 1 else "s")
            kept = f"its best counts, with only {number} to compare with"
            return Verdict(True, "COMPLETE", records.RISING, f"{shown}; {kept}")
        median = statistics.median(peers)
        place = f"the median of {len(peers)} finished trials, {median:.4f}"
        if best < median:
            return Verdict(True, "COMPLETE", records.RISING, f"{shown}; its best counts, being better than {place}")
        return Verdict(True, "PRUNED", records.RISING, f"{shown}; its best is no better than {place}")


def verdict(study: optuna.Study, trial: FrozenTrial) -> Verdict | None:
    """What the study's pruner makes of a running trial at its latest epoch; None to go on."""
    pruner = study.pruner
    if isinstance(pruner, RisingLossPruner):
        return pruner.verdict(study, trial)
    return _superseded(pruner, trial) if pruner.prune(study, trial) else None


def make_pruner(name: str, *, patience: int = 3, min_delta: float = 0.0, num_epochs: int = 10) -> BasePruner:
    """The pruner of `--pruner NAME`. All but `none` include the rising-loss rule.

    Args:
        name: One of `PRUNERS`.
        patience: See `RisingLossPruner`.
        min_delta: See `RisingLossPruner`.
        num_epochs: Epochs of a full trial, Hyperband's largest resource.

    Raises:
        StudyError: the name is unknown.
    """
    other: BasePruner | None = None
    match name:
        case "none":
            return NopPruner()
        case "rising":
            pass
        case "hyperband":
            # It only decides here. As the study's own pruner it would also hide the other brackets' trials from TPE,
            # which a dozen trials cannot afford.
            other = HyperbandPruner(min_resource=1, max_resource=num_epochs, reduction_factor=3)
        case "halving":
            other = HalvingPruner()
        case "median":
            other = MedianPruner(n_startup_trials=MIN_PEERS, n_warmup_steps=1)
        case _:
            raise StudyError(f"there is no pruner {name!r}{nearest(name, PRUNERS)}; known: {', '.join(PRUNERS)}")
    return RisingLossPruner(patience=patience, min_delta=min_delta, other=other)


def pruner_for(name: str, config: TrainConfig) -> BasePruner:
    """`make_pruner` with the settings of a study's base configuration."""
    return make_pruner(name, patience=config.patience, min_delta=config.min_delta, num_epochs=config.num_epochs)


def _curves(trial: FrozenTrial) -> tuple[list[float | None], list[float | None]]:
    """(training, validation) loss by epoch up to the latest report, both of that length; None where unknown."""
    last = max(trial.intermediate_values)
    val = [trial.intermediate_values.get(epoch) for epoch in range(1, last + 1)]
    train: list[float | None] = list(trial.user_attrs.get(records.TRAIN_LOSSES, ()))[:last]
    return train + [None] * (last - len(train)), val


def _peer_values(study: optuna.Study, trial: FrozenTrial) -> list[float]:
    """Best values of the other finished trials.

    Without probes of stability, which end after one epoch, and trials that violated a constraint.
    """
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    values = (best_value(t) for t in finished if t.number != trial.number and _is_peer(t.user_attrs, t.constraints))
    return [value for value in values if value is not None]


def _is_peer(attrs: Mapping[str, Any], constraints: Mapping[str, float]) -> bool:
    return attrs.get(records.REASON) != records.PROBE and not any(value > 0 for value in constraints.values())


def _superseded(pruner: BasePruner, trial: FrozenTrial) -> Verdict:
    epoch = max(trial.intermediate_values)
    value = trial.intermediate_values[epoch]
    detail = f"{type(pruner).__name__} gave it up at epoch {epoch} with validation loss {value:.4f}"
    return Verdict(True, "PRUNED", records.SUPERSEDED, detail)


def _describe_rise(val: Losses, patience: int) -> str:
    finite = [(loss, epoch) for epoch, loss in enumerate(val, 1) if _finite(loss)]
    since = ", ".join(_show(loss) for loss in val[-patience:])
    if not finite:
        return f"no finite validation loss in {len(val)} epochs"
    best, epoch = min(finite)
    return f"validation loss has no new best for {patience} epochs: {best:.4f} at epoch {epoch}, lately {since}"


def _describe_jump(train: Losses, val: Losses) -> str:
    before = [loss for loss in train[:-1] if _finite(loss)][-1]
    best = min(loss for loss in val[:-1] if _finite(loss))
    return (
        f"both losses jump up at epoch {len(val)}: training {_show(before)} -> {_show(train[-1])}, "
        f"validation {_show(val[-1])} against {_show(best)} at best"
    )


def _show(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"
