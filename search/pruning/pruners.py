"""When a trial stops or pauses, and with which outcome: a rising loss, a jump, or what comparison with others says.

Optuna's own pruners cannot do this: Median, Hyperband and SuccessiveHalving never stop a rising trial that is still
the best of its study, and PatientPruner never stops a curve of NaN (measured with Optuna 5.0).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.pruners import BasePruner, SuccessiveHalvingPruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search import records
from search.leaderboard import samples_of
from search.planning.budget import Budget
from search.planning.plan import Plan, is_unbegun
from search.pruning.rules import Losses, describe_jump, describe_rise, diverged, rising
from search.records import Outcome

MIN_PEERS = 3
"""Finished trials needed before "no better than their median" says anything.

The median of one or two trials is an extreme, or the mean of both extremes: one lucky first trial would turn every
overfitting trial after it into a PRUNED one. With three it is a value with one on either side.
"""


def best_value(trial: FrozenTrial) -> float | None:
    """The lowest finite validation loss of a trial: its value if COMPLETE, unless that is of its captions
    (`records.CIDER`), else of what it reported."""
    if trial.state == TrialState.COMPLETE and records.CIDER not in trial.user_attrs:
        return trial.value
    return min((v for v in trial.intermediate_values.values() if math.isfinite(v)), default=None)


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

    def verdict(
        self, study: optuna.Study, trial: FrozenTrial, alike: Callable[[], optuna.Study] | None = None
    ) -> Outcome | None:
        """The outcome of the trial if it ends at its latest epoch, or None to go on.

        Args:
            study: The study whose finished trials are the peers.
            trial: The running trial as the storage has it, its latest epoch reported.
            alike: Gives the study as the other pruner is to see it, which cannot tell trials on other samples.

        Returns:
            PRUNED at once for divergence; for a rising loss PRUNED if its best is no better than the peers' median,
            else COMPLETE with that best (`stopped_early`), so that a record is not thrown away; PRUNED if the other
            pruner gives it up; None otherwise.
        """
        if not trial.intermediate_values:
            return None
        train, val = _curves(trial)
        if diverged(train, val):
            return Outcome(state="PRUNED", reason=records.DIVERGED, detail=describe_jump(train, val))
        if rising(val, self._patience, self._min_delta):
            return self._judge_rising(study, trial, val)
        if self._other is not None and self._other.prune(alike() if alike else study, trial):
            return _superseded(self._other, trial)
        return None

    def _judge_rising(self, study: optuna.Study, trial: FrozenTrial, val: Losses) -> Outcome:
        rise = describe_rise(val, self._patience)
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

    def verdict(
        self, study: optuna.Study, trial: FrozenTrial, alike: Callable[[], optuna.Study] | None = None
    ) -> Outcome | None:
        """As `RisingLossPruner.verdict`; WAITING if the trial pauses.

        A loss that rises does not end a trial which the plan expects to gain yet: with 32 validation samples an
        epoch's noise is 0.8 %, so that of curves which still fall by 0.3 % an epoch many have no new best for three.
        """
        outcome = super().verdict(study, trial, alike)
        if not trial.intermediate_values:
            return outcome
        trials = study.get_trials(deepcopy=False)
        if outcome is not None and not (outcome.reason == records.RISING and self.plan.may_gain(trials, trial)):
            return outcome
        if self._budget.is_spent(trials):
            return Outcome(state="WAITING", reason=records.PAUSED, detail=self._budget.spent())
        new_left = any(map(is_unbegun, trials)) or self._budget.new_left(trials, self.plan)
        why = self.plan.pause(trials, trial, new_left=new_left, left=self._budget.left(trials))
        return None if why is None else Outcome(state="WAITING", reason=records.PAUSED, detail=why)


def plan_of(pruner: BasePruner) -> Plan | None:
    """The plan by which a pruner pauses trials; None if it does not."""
    return pruner.plan if isinstance(pruner, PausingPruner) else None


def settled(study: optuna.Study, trial: FrozenTrial, why: str) -> Outcome:
    """The outcome of a paused trial that does not go on: COMPLETE if none that is COMPLETE is better, else PRUNED.

    Those on the same samples count. Optuna's best trial is the best of those that are COMPLETE.
    """
    best, own = best_value(trial), _samples(trial)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    rivals = [t.value for t in complete if _samples(t) == own]
    if best is not None and all(value is not None and best < value for value in rivals):
        return Outcome(state="COMPLETE", reason=records.SETTLED, detail=why, stopped_early=True)
    return Outcome(state="PRUNED", reason=records.SUPERSEDED, detail=why)


def verdict(
    study: optuna.Study, trial: FrozenTrial, alike: Callable[[], optuna.Study] | None = None
) -> Outcome | None:
    """The outcome that the study's pruner gives a running trial at its latest epoch; None to go on.

    For the arguments see `RisingLossPruner.verdict`.
    """
    pruner = study.pruner
    if isinstance(pruner, RisingLossPruner):
        return pruner.verdict(study, trial, alike)
    return _superseded(pruner, trial) if pruner.prune(study, trial) else None


def _curves(trial: FrozenTrial) -> tuple[list[float | None], list[float | None]]:
    """(training, validation) loss by epoch up to the latest report, both of that length; None where unknown."""
    last = max(trial.intermediate_values)
    val = [trial.intermediate_values.get(epoch) for epoch in range(1, last + 1)]
    train: list[float | None] = list(trial.user_attrs.get(records.TRAIN_LOSSES, ()))[:last]
    return train + [None] * (last - len(train)), val


def _peer_values(study: optuna.Study, trial: FrozenTrial) -> list[float]:
    """Best values of the other finished trials on the same samples, probes of stability (one epoch) and constraint
    violations left out."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    own = _samples(trial)
    values = (
        best_value(t)
        for t in finished
        if t.number != trial.number and _is_peer(t.user_attrs, t.constraints) and _samples(t) == own
    )
    return [value for value in values if value is not None]


def _samples(trial: FrozenTrial) -> tuple[Any, ...]:
    return samples_of(trial.user_attrs, trial.user_attrs.get(records.CONFIG) or {})


def _is_peer(attrs: Mapping[str, Any], constraints: Mapping[str, float]) -> bool:
    return attrs.get(records.REASON) != records.PROBE and not any(value > 0 for value in constraints.values())


def _superseded(pruner: BasePruner, trial: FrozenTrial) -> Outcome:
    epoch = max(trial.intermediate_values)
    value = trial.intermediate_values[epoch]
    detail = f"{type(pruner).__name__} gave it up at epoch {epoch} with validation loss {value:.4f}"
    return Outcome(state="PRUNED", reason=records.SUPERSEDED, detail=detail)
