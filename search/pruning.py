"""When a trial stops before its last epoch: rules on its own curve, and Optuna's pruners that compare it with others.

    rising     no new best validation loss for `patience` evaluations in a row
    diverged   training and validation loss jump up at the same epoch
    verdict    the outcome where a rule fires: PRUNED, or COMPLETE with the best value reached

A new pruner is one entry in `PRUNERS`: its name for `--pruner`, a line of help, and what makes it.

Optuna's own pruners cannot do this: Median, Hyperband and SuccessiveHalving never stop a rising trial that is still
the best of its study, and PatientPruner never stops a curve of NaN (measured with Optuna 5.0).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search import records
from search.diagnosis.unstable import JUMP
from search.errors import StudyError
from search.planning.budget import Budget
from search.planning.comparable import Comparable
from search.planning.plan import Plan
from search.planning.prior import Prior
from search.planning.rungs import RungPlan
from search.planning.thaw import FreezeThaw
from search.records import Outcome
from trainer.common.errors import nearest, shown

if TYPE_CHECKING:
    from search.study import Study

MIN_PEERS = 3
"""Finished trials needed before "no better than their median" says anything.

The median of one or two trials is an extreme, or the mean of both extremes: one lucky first trial would turn every
overfitting trial after it into a PRUNED one. With three it is a value with one on either side.
"""

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


def best_value(trial: FrozenTrial) -> float | None:
    """The lowest finite validation loss of a trial: its value if COMPLETE, unless that is of its captions
    (`records.CIDER`), else of what it reported."""
    if trial.state == TrialState.COMPLETE and records.CIDER not in trial.user_attrs:
        return trial.value
    return min((v for v in trial.intermediate_values.values() if math.isfinite(v)), default=None)


def _finite(loss: float | None) -> TypeGuard[float]:
    return loss is not None and math.isfinite(loss)


def _jumps(loss: float | None, reference: float | None, jump: float) -> bool:
    if loss is None or reference is None:
        return False
    return not math.isfinite(loss) or loss > reference * (1 + jump)


class HalvingPruner(SuccessiveHalvingPruner):
    """Successive halving that takes a promotion back once enough other trials have reached the same rung.

    Optuna's (ASHA, Li et al. 2018) judges a trial once, among those that reached the rung before it: if trials are
    trained side by side, the first to arrive train to the end whatever the others reach. Here every rung behind a
    trial is checked again after each epoch. For trials that run one after the other it is equal to Optuna's, since
    the field does not grow meanwhile.

    Args:
        min_resource: Epoch of the first rung.
        reduction_factor: One trial in this many goes on; each rung is this many times later than the one before.
    """

    def __init__(self, min_resource: int = 1, reduction_factor: int = 3) -> None:
        super().__init__(min_resource=min_resource, reduction_factor=reduction_factor)
        self._one_of = reduction_factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial should stop now: at a rung, or because of others' values at one behind it."""
        if super().prune(study, trial):
            return True
        trials = study.get_trials(deepcopy=False)
        sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
        rung = 0
        # From the storage: the call above has noted there the rung that the trial has just passed.
        reached = next(each for each in trials if each.number == trial.number).system_attrs
        while (key := f"completed_rung_{rung}") in reached:
            field = sorted(sign * each.system_attrs[key] for each in trials if key in each.system_attrs)
            if sign * reached[key] > field[max(len(field) // self._one_of, 1) - 1]:
                return True
            rung += 1
        return False


class RisingLossPruner(BasePruner):
    """Stops a trial whose validation loss rises, whose losses diverge, or that another pruner gives up.

    Reads the trial's own reports (`trial.report(val_loss, step=epoch)`, NaN allowed) and its user attribute
    `records.TRAIN_LOSSES`. Other trials are read only once a trial would stop, never at a healthy epoch.

    Args:
        patience: Evaluations in a row without a new best before the loss counts as rising.
        min_delta: A validation loss is a new best if it is lower by more than this.
        min_peers: Finished trials with a value needed to compare with their median.
        other: The pruner to ask if neither rule fires, e.g. `optuna.pruners.HyperbandPruner`.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        *,
        patience: int,
        min_delta: float,
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
        """Whether the trial should stop now; `verdict` says with which outcome."""
        return self.verdict(study, trial) is not None

    def verdict(self, study: optuna.Study, trial: FrozenTrial) -> Outcome | None:
        """The outcome of the trial if it ends at its latest epoch, or None to go on.

        Args:
            study: The study whose finished trials are the peers.
            trial: The running trial as the storage has it, its latest epoch reported.

        Returns:
            PRUNED at once for divergence; for a rising loss PRUNED if its best is no better than the peers' median,
            else COMPLETE with that best (`stopped_early`), so that a record is not thrown away; PRUNED if the other
            pruner gives it up; None otherwise.
        """
        if not trial.intermediate_values:
            return None
        train, val = _curves(trial)
        if diverged(train, val):
            return Outcome(state="PRUNED", reason=records.DIVERGED, detail=_describe_jump(train, val))
        if rising(val, self._patience, self._min_delta):
            return self._judge_rising(study, trial, val)
        if self._other is not None and self._other.prune(study, trial):
            return _superseded(self._other, trial)
        return None

    def _judge_rising(self, study: optuna.Study, trial: FrozenTrial, val: Losses) -> Outcome:
        rise = _describe_rise(val, self._patience)
        best = best_value(trial)
        if best is None:  # a cliff that TPE should learn of, not a rising curve
            reason = records.NON_FINITE
            return Outcome(state="PRUNED", reason=reason, detail=rise, violated=reason)
        keep, why = self._compare(best, _peer_values(study, trial))
        state = "COMPLETE" if keep else "PRUNED"
        return Outcome(state=state, reason=records.RISING, detail=f"{rise}; {why}", stopped_early=keep)

    def _compare(self, best: float, peers: Sequence[float]) -> tuple[bool, str]:
        """(whether a rising trial's best value counts, why or why not)."""
        if len(peers) < self._min_peers:
            number = f"{len(peers)} finished trial" + ("" if len(peers) == 1 else "s")
            return True, f"its best counts, with only {number} to compare with"
        median = statistics.median(peers)
        place = f"the median of {len(peers)} finished trials, {median:.4f}"
        if best < median:
            return True, f"its best counts, being better than {place}"
        return False, f"its best is no better than {place}"


class PausingPruner(RisingLossPruner):
    """Stops what `RisingLossPruner` stops, and pauses what a plan finds less worth than other trials.

    Args:
        plan: Says which trials pause and go on.
        budget: Of the whole study.
        patience: See `RisingLossPruner`.
        min_delta: See `RisingLossPruner`.
    """

    def __init__(self, plan: Plan, budget: Budget, *, patience: int, min_delta: float) -> None:
        super().__init__(patience=patience, min_delta=min_delta)
        self.plan = plan
        self._budget = budget

    def verdict(self, study: optuna.Study, trial: FrozenTrial) -> Outcome | None:
        """As `RisingLossPruner.verdict`; WAITING if the trial pauses.

        A loss that rises does not end a trial which the plan expects to gain yet: with 32 validation samples an
        epoch's noise is 0.8 %, so that of curves which still fall by 0.3 % an epoch many have no new best for three.
        """
        outcome = super().verdict(study, trial)
        if not trial.intermediate_values:
            return outcome
        trials = study.get_trials(deepcopy=False)
        if outcome is not None and not (outcome.reason == records.RISING and self.plan.may_gain(trials, trial)):
            return outcome
        if self._budget.is_spent(trials):
            spent = f"all {self._budget.epochs} epochs are trained"
            return Outcome(state="WAITING", reason=records.PAUSED, detail=spent)
        why = self.plan.pause(trials, trial, new_left=self._budget.new_left(trials, self.plan))
        return None if why is None else Outcome(state="WAITING", reason=records.PAUSED, detail=why)


def plan_of(pruner: BasePruner) -> Plan | None:
    """The plan by which a pruner pauses trials; None if it does not."""
    return pruner.plan if isinstance(pruner, PausingPruner) else None


def settled(study: optuna.Study, trial: FrozenTrial, why: str) -> Outcome:
    """The outcome of a paused trial that does not go on: COMPLETE if none that is COMPLETE is better, else PRUNED.

    Optuna's best trial is the best of those that are COMPLETE.
    """
    best = best_value(trial)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if best is not None and all(t.value is not None and best < t.value for t in complete):
        return Outcome(state="COMPLETE", reason=records.SETTLED, detail=why, stopped_early=True)
    return Outcome(state="PRUNED", reason=records.SUPERSEDED, detail=why)


def verdict(study: optuna.Study, trial: FrozenTrial) -> Outcome | None:
    """The outcome that the study's pruner gives a running trial at its latest epoch; None to go on."""
    pruner = study.pruner
    if isinstance(pruner, RisingLossPruner):
        return pruner.verdict(study, trial)
    return _superseded(pruner, trial) if pruner.prune(study, trial) else None


@dataclass(frozen=True)
class Kind:
    """A value of `--pruner`."""

    about: str
    """What it does, for `--help`."""
    other: Callable[[int], BasePruner] | None = None
    """Makes the pruner asked beside the rising-loss rule, given the epochs of a full trial."""
    rising: bool = True
    """Whether the rising-loss rule applies."""
    plan: Callable[[Study, Prior, bool], Plan] | None = None
    """Makes the plan by which trials pause, beside the rising-loss rule."""


PRUNERS: dict[str, Kind] = {
    "rising": Kind("stop a trial whose validation loss rises or whose losses jump up"),
    "hyperband": Kind(
        "rising, and Hyperband",
        # It only decides here. As the study's own pruner it would also hide the other brackets' trials from TPE,
        # which a dozen trials cannot afford.
        lambda num_epochs: HyperbandPruner(min_resource=1, max_resource=num_epochs, reduction_factor=3),
    ),
    "halving": Kind("rising, and successive halving", lambda num_epochs: HalvingPruner()),
    "median": Kind(
        "rising, and the median of other trials at the same epoch",
        lambda num_epochs: MedianPruner(n_startup_trials=MIN_PEERS, n_warmup_steps=1),
    ),
    "freeze-thaw": Kind(
        "rising, and pause a trial for what is worth more: another one, or a new configuration",
        plan=lambda study, prior, proposes: FreezeThaw(study, prior, proposes=proposes),
    ),
    "rungs": Kind(
        "rising, and pause at epochs 1, 3, 9, ...: the best third goes on, at the end the leaders",
        plan=lambda study, _prior, _proposes: RungPlan(study.base_config().num_epochs, among=Comparable(study).among),
    ),
    "none": Kind("train all epochs", rising=False),
}
"""What `--pruner` can name."""


def default_pruner(strategy: str) -> str:
    """The pruner that goes with a `--strategy`, where none is given: the plan that samples also pauses."""
    return strategy if PRUNERS.get(strategy, Kind("")).plan is not None else "rising"


def check_name(name: str) -> None:
    """Make sure that there is a pruner of this name.

    Raises:
        StudyError: there is none.
    """
    if name not in PRUNERS:
        raise StudyError(f"there is no pruner {shown(name)}{nearest(name, PRUNERS)}; known: {', '.join(PRUNERS)}")


def help_text() -> str:
    """The help of `--pruner`: each name with what it does."""
    return "; ".join(f"{name}: {kind.about}" for name, kind in PRUNERS.items())


def make_pruner(name: str, *, patience: int, min_delta: float, num_epochs: int) -> BasePruner:
    """The pruner of `--pruner NAME`. All but `none` include the rising-loss rule.

    Args:
        name: A name in `PRUNERS`.
        patience: See `RisingLossPruner`.
        min_delta: See `RisingLossPruner`.
        num_epochs: Epochs of a full trial, Hyperband's largest resource.

    Raises:
        StudyError: the name is unknown.
    """
    check_name(name)
    kind = PRUNERS[name]
    if not kind.rising:
        return NopPruner()
    other = kind.other(num_epochs) if kind.other else None
    return RisingLossPruner(patience=patience, min_delta=min_delta, other=other)


def pruner_for(
    name: str, study: Study, budget: Budget | None = None, *, prior: Prior | None = None, proposes: bool = False
) -> BasePruner:
    """The pruner of `--pruner NAME` with the settings of a study.

    Args:
        name: A name in `PRUNERS`.
        study: Its rule for stopping, and what a plan needs.
        budget: Of the whole study; None for its own number of trials.
        prior: What is known of good effective rates, for a plan.
        proposes: Whether new configurations are the plan's own proposals.
    """
    check_name(name)
    make_plan = PRUNERS[name].plan
    if make_plan is not None:
        plan = make_plan(study, prior or Prior(), proposes)
        total = budget or Budget(study.n_trials)
        return PausingPruner(plan, total, patience=study.patience, min_delta=study.min_delta)
    num_epochs = study.base_config().num_epochs
    return make_pruner(name, patience=study.patience, min_delta=study.min_delta, num_epochs=num_epochs)


def _curves(trial: FrozenTrial) -> tuple[list[float | None], list[float | None]]:
    """(training, validation) loss by epoch up to the latest report, both of that length; None where unknown."""
    last = max(trial.intermediate_values)
    val = [trial.intermediate_values.get(epoch) for epoch in range(1, last + 1)]
    train: list[float | None] = list(trial.user_attrs.get(records.TRAIN_LOSSES, ()))[:last]
    return train + [None] * (last - len(train)), val


def _peer_values(study: optuna.Study, trial: FrozenTrial) -> list[float]:
    """Best values of the other finished trials, probes of stability (one epoch) and constraint violations left out."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    values = (best_value(t) for t in finished if t.number != trial.number and _is_peer(t.user_attrs, t.constraints))
    return [value for value in values if value is not None]


def _is_peer(attrs: Mapping[str, Any], constraints: Mapping[str, float]) -> bool:
    return attrs.get(records.REASON) != records.PROBE and not any(value > 0 for value in constraints.values())


def _superseded(pruner: BasePruner, trial: FrozenTrial) -> Outcome:
    epoch = max(trial.intermediate_values)
    value = trial.intermediate_values[epoch]
    detail = f"{type(pruner).__name__} gave it up at epoch {epoch} with validation loss {value:.4f}"
    return Outcome(state="PRUNED", reason=records.SUPERSEDED, detail=detail)


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
