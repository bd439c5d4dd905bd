"""`Plan`: which trials pause, and which goes on when there is room.

A trial that pauses keeps its checkpoint and its reports and is WAITING in Optuna, with `records.PAUSED` as its reason.
Whenever a worker has room, the plan says whether a paused trial goes on or a new configuration begins; at the end of
the study, paused trials that are not worth more become PRUNED (freeze-thaw, Swersky et al. 2014, arXiv 1406.3896).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from optuna.trial import FrozenTrial, TrialState

from search import records


class Plan(Protocol):
    """A rule of pausing. It knows nothing but the trials: the same trials give the same answer, on any host."""

    def pause(
        self, trials: Sequence[FrozenTrial], trial: FrozenTrial, *, new_left: bool, left: int | None = None
    ) -> str | None:
        """Why a running trial should pause after its latest epoch, for people to read; None to go on.

        Args:
            trials: All trials of the study.
            trial: The running one, its latest epoch reported.
            new_left: Whether another configuration could begin in its place, a queued one too.
            left: Epochs that a budget of epochs has left, None without one.
        """

    def may_gain(self, trials: Sequence[FrozenTrial], trial: FrozenTrial) -> bool:
        """Whether more epochs of a running trial may lower the study's lowest loss, though its own rises."""

    def resume(self, trials: Sequence[FrozenTrial], *, new_left: bool, left: int | None = None) -> int | None:
        """Number of the paused trial that goes on now; None to begin a new configuration, or for nothing at all.

        Args:
            trials: All trials of the study.
            new_left: Whether a new configuration can begin.
            left: See `pause`.
        """

    def wanted(self, trials: Sequence[FrozenTrial]) -> int:
        """Epochs that trials which have begun are to have, whatever else begins (`Budget.new_left`)."""

    def give_up(self, trials: Sequence[FrozenTrial], trial: FrozenTrial) -> str:
        """Why a paused trial is given up at the study's end, for people to read."""


def number_counted(trials: Sequence[FrozenTrial]) -> int:
    """How many of a study's trials count towards its total.

    Every trial counts, whatever its state, unless another has taken up its work: the two are one. Waiting trials count
    since they are going to run, a lost trial without a successor since it has used its turn. Repeats do not: they are
    no configurations of their own.
    """
    own = [trial for trial in trials if not is_repeat(trial)]
    return len(own) - len({t.user_attrs[records.RESUMES] for t in own if records.RESUMES in t.user_attrs})


def is_repeat(trial: FrozenTrial) -> bool:
    """Whether the trial repeats another one with another seed, and is none of the search's."""
    return records.REPEAT_OF in trial.user_attrs


def is_paused(trial: FrozenTrial) -> bool:
    """Whether the trial waits because the plan paused it, after an epoch, and not for any other reason.

    Other programs may queue a trial with a paused one's attributes, but no epochs.
    """
    reason = trial.user_attrs.get(records.REASON)
    return trial.state == TrialState.WAITING and reason == records.PAUSED and bool(trial.intermediate_values)


def is_unbegun(trial: FrozenTrial) -> bool:
    """Whether the trial is one of the search's own that waits for its first epoch: given by hand, or queued."""
    return trial.state == TrialState.WAITING and not trial.intermediate_values and not is_repeat(trial)


def paused(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The paused ones among these."""
    return [trial for trial in trials if is_paused(trial)]
