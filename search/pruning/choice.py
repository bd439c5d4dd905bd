"""The pruners that `--pruner` can name, and how one is made.

A new pruner is one entry in `PRUNERS`: its name, a line of help, and what makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner

from search.errors import StudyError
from search.planning.budget import Budget
from search.planning.comparable import Comparable
from search.planning.plan import Plan
from search.planning.prior import Prior
from search.planning.rungs import RungPlan
from search.planning.thaw import FreezeThaw
from search.pruning.pruners import MIN_PEERS, HalvingPruner, PausingPruner, RisingLossPruner
from trainer.common.errors import nearest, shown

if TYPE_CHECKING:
    from search.study import Study


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


def rung_plan(study: Study) -> RungPlan:
    """The plan of `--pruner rungs` for a study's own trials."""
    comparable = Comparable(study)
    return RungPlan(study.most_epochs(), among=comparable.among, planned=comparable.planned)


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
        plan=lambda study, _prior, _proposes: rung_plan(study),
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
    num_epochs = study.most_epochs()
    return make_pruner(name, patience=study.patience, min_delta=study.min_delta, num_epochs=num_epochs)
